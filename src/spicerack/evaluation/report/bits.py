"""Where the bits went, what each further one would buy, and what each part of the model would lose."""

from __future__ import annotations

import re
from typing import Any

from spicerack.evaluation.report import charts
from spicerack.evaluation.report.markup import (
    Markup,
    join,
    missing,
    say,
    section,
    short,
    size,
    spread,
    table,
    tag,
    text,
    whole,
)  # fmt: skip

_BLOCK = re.compile(r"\.(\d+)\.")
_POINTS = 24
"""Points of the curve that the table lists, evenly chosen."""
COMMAND = "quantize MODEL -o OUT --bits 3.5 --calib TEXT"


def bits(facts: dict[str, Any]) -> Markup:
    """Where they went, for everyone."""
    title = say("Where the bits went", "位数花在了哪里")
    if not facts["blocks"]:
        return section(title, tag("p", say("Nothing in this folder is quantized.", "这个文件夹里没有量化的层。")))
    return section(title, tag("p", say(
        "A model is a stack of blocks, one a line here, and each block has parts, one a column. A part that would have "
        "hurt more can be given more bits: larger jars for the strongest spices.",
        "模型由一层层组成(每行一层),每层有几部分(每列一种)。更怕“走味”的部分可以多给几位:最浓的香料用大一点的瓶。",
    )), charts.strip(facts["blocks"]))  # fmt: skip


def further(facts: dict[str, Any]) -> Markup:
    """What each further bit would buy: the curve of a run with a budget, with this run's point."""
    title, known = say("What each further bit would buy", "多一位能换来什么"), facts["sensitivity"]
    if known is None or not known["curve"]:
        if facts["unreadable"]:
            return Markup("")
        return section(title, missing(COMMAND, "the loss at other numbers of bits", "其他位数下的损失"))
    points, rounds = known["curve"], known["rounds"]
    step = max(len(points) // _POINTS, 1)
    rows = [
        [size(p["nbytes"]), short(p["bits"]), short(p["predicted"]), say("predicted", "预测")] for p in points[::step]
    ]
    rows += [
        [size(r["nbytes"]), short(r["bits"]), short(r["measured"]),
         say("measured, 95 % interval {ends}", "实测,95 % 区间 {ends}", ends=spread(*r["interval"]))]
        for r in rounds
    ]  # fmt: skip
    caption = tag("figcaption", say(
        "Across: room on disk, from {small} to {large}. Upwards: the loss, each line ten times the one below; lower is "
        "better. The curve is the best mix of numbers for each size, as predicted from what each part loses; dots were "
        "written and measured, with their 95 % intervals; the large one is this model.",
        "横轴:占用空间,从 {small} 到 {large};纵轴:损失,每条线是下一条的十倍,越低越好。曲线是每种大小下最好的搭配"
        "(由各部分的损失预测);圆点是真正写出并实测的,带 95 % 区间;大圆点就是这个模型。",
        small=size(points[0]["nbytes"]), large=size(points[-1]["nbytes"]),
    ), id="curve-title")  # fmt: skip
    head = [say("all bytes", "总大小"), say("bits of a weight", "每个权重位数"),
            join(say("loss: ", "损失:"), _metric(known)), say("how", "方法")]  # fmt: skip
    return section(
        title,
        tag("figure", caption, charts.curve(points, rounds)),
        table(say("The same in numbers.", "同样的数据。"), head, rows),
    )


def sensitivity(facts: dict[str, Any]) -> Markup:
    """Part by part: the numbers that were chosen, and what that part alone then loses."""
    known = facts["sensitivity"]
    if known is None:
        return (
            Markup("")
            if facts["unreadable"]
            else missing(COMMAND, "what each part of the model loses", "模型各部分的损失")
        )
    rows = []
    for unit in known["units"]:
        cheapest, finest = (list(unit["schemes"].items())[i] for i in (0, -1))
        rows.append([
            _short_name(unit["name"]), whole(unit["weights"]), unit["chosen"] or say("none yet", "尚未选"),
            short(unit["loss"]), join(cheapest[0], ": ", short(cheapest[1]["loss"])),
            join(finest[0], ": ", short(finest[1]["loss"])),
        ])  # fmt: skip
    caption = say(
        "What each part loses alone, {metric}, the worst first: from one pass backwards through the float model, "
        "corrected where a swap was measured. No intervals: those stand at the measured rounds.",
        "每一部分单独造成的损失({metric}),从大到小:由对浮点模型的一次反向传播得出,并用实测的替换修正。"
        "没有区间:区间见实测的各轮。",
        metric=_metric(known),
    )  # fmt: skip
    head = [say("part", "部分"), say("weights", "权重个数"), say("numbers chosen", "选定的数制"),
            say("its loss", "损失"), say("in the fewest bits", "最少位数"), say("in the most", "最多位数")]  # fmt: skip
    left = known["units_left_out"]
    more = tag("p", say("{n} parts that lose less are not listed.", "另有 {n} 个损失更小的部分未列出。", n=whole(left)),
               class_="dim") if left else Markup("")  # fmt: skip
    return join(charts.heat(_cells(known["units"])), table(caption, head, rows), more)


def _metric(known: dict[str, Any]) -> Markup:
    """What a loss is counted in."""
    return say("nats of KL per token", "每词元 KL(nat)") if known["metric"] == "kl" else say("1 - cosine", "1 - 余弦")


def _cells(units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the picture: block, part, scheme, loss."""
    cells = []
    for unit in units:
        match = _BLOCK.search(unit["name"])
        part = unit["name"][match.end() :] if match else unit["name"]
        place = int(match[1]) if match else None
        cells.append({"block": place, "layer": part, "scheme": unit["chosen"], "loss": unit["loss"]})
    return cells


def _short_name(name: str) -> Markup:
    """Without what all have in common."""
    return text(name.removeprefix("model."))
