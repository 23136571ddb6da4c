"""The page: one HTML file without network, a pure function of the facts.

First what everybody wants to know, then what experts check. What was not measured is said to be missing, with the
command that measures it. A policy in the page lets no script run but its own, by its hash, and no request leave.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from spicerack.errors import SchemeError
from spicerack.evaluation.report import bits, charts, experts, lost, markup, places
from spicerack.evaluation.report.markup import (
    Markup,
    hundred,
    join,
    labelled,
    math_floor,
    missing,
    say,
    section,
    short,
    size,
    table,
    tag,
    text,
)  # fmt: skip
from spicerack.numerics.scheme import parse

_HERE = Path(__file__).parent
_PAGE_TOKENS = 500
"""Tokens of a page of text."""


def page(facts: dict[str, Any]) -> str:
    """The facts, as `facts.collect` gives them, as HTML."""
    script, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    stored = json.dumps(facts, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":  # what could end the element, or begin another
        stored = stored.replace(character, f"\\u{ord(character):04x}")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(facts['name'])} · spicerack</title><style>{style}</style>"
    )
    body = tag("main", *_sections(facts), id="main")
    data = f'<script type="application/json" id="facts">{stored}</script>'
    content = f"{_skip()}{body}{data}<script>{script}</script>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{content}</body></html>\n'


def _skip() -> Markup:
    return tag("a", say("To the text", "跳到正文"), href="#main", class_="skip")


def _sections(facts: dict[str, Any]) -> list[Markup]:
    """In the order that they are read."""
    language = tag("button", "中文", id="language", type="button", lang="zh-CN", hidden=True)
    save = tag("button", say("Numbers as JSON", "下载 JSON"), id="save", type="button", hidden=True)
    return [
        tag("nav", language, save),
        *_verdict(facts),
        _done(facts),
        _gained(facts),
        lost.lost(facts),
        bits.bits(facts),
        bits.further(facts),
        places.places(facts),
        *experts.sections(facts),
        _unsaid(facts),
    ]


def _verdict(facts: dict[str, Any]) -> list[Markup]:
    """What it was, what it is, and what that cost, in three sentences."""
    parts = [say(
        "{before} of weights became {after}: {times} times "
        "smaller.", "权重从 {before} 变成 {after}:缩小到原来的 1/{times}。",
        before=tag("b", size(facts["bytes_before"])), after=tag("b", size(facts["bytes_after"])),
        times=short(facts["times_smaller"]),
    )]  # fmt: skip
    result = lost.result(facts) or {}
    if "top1_agreement" in result:
        parts.append(say(
            " Of 100 next words it picks {n} the same as the "
            "original.", "每猜 100 个“下一个词”,有 {n} 个和原模型一样。",
            n=tag("b", hundred(result["top1_agreement"])),
        ))  # fmt: skip
    elif "cosine_mean" in result:
        parts.append(say(
            " What it makes of a sentence is {cosine} alike, where 1 is the "
            "same.", "它对句子的表示与原模型的相似度为 {cosine}(1 为完全相同)。",
            cosine=tag("b", f"{math_floor(result['cosine_mean'], 5):g}"),
        ))  # fmt: skip
    elif facts["unreadable"]:
        parts.append(say(" What that cost its answers is not measured here.", "这对回答有多大影响,这里没有测。"))
    elif lost.measured_for_budget(facts):
        parts.append(say(" What that cost stands below.", "损失了多少,见下文。"))
    else:
        parts.append(say(" What that cost was not measured yet.", "损失了多少,还没有测。"))
    if facts["bench"]:
        held = facts["bench"]["result"]["rows"][1]["resident_bytes"]
        parts.append(say(" Its weights take {held} of memory.", "权重占用内存 {held}。", held=tag("b", size(held))))
    return [tag("h1", facts["name"]), tag("p", *parts, class_="lead")]


def _done(facts: dict[str, Any]) -> Markup:
    """What rounding is, in a picture of this model's own weights."""
    story = tag("p", say(
        "A chef cooks with a thousand spices. For a picnic a few small jars are enough: each spice goes into the "
        "jar that "
        "tastes closest, and a label on each group of jars says how strong they are. The numbers of this model "
        "were treated the same way: "
        "a weight now takes {bits} bits on average, labels counted. Everything together, with what was left as "
        "it was, takes {all} bits for each number.",
        "大厨有一千种香料;去野餐时,带几个小瓶就够:每种香料都归到味道最接近的那一瓶,每组瓶子贴一张标签,写明味道有"
        "多浓。"
        "这个模型里的数也是这样处理的:现在每个权重平均占 {bits} 位(含标签);连同保持原样的部分,平均每个数占 {all} "
        "位。",
        bits=tag("b", short(facts["bits_quantized"])), all=short(facts["bits_all"]),
    ))  # fmt: skip
    title = say("What was done", "做了什么")
    row = facts["lens"]["result"] if facts["lens"] else None
    if not row and facts["unreadable"]:
        return section(title, story)
    if not row:
        return section(title, story, missing(
            "eval OUT --against MODEL --text FILE", "weights of this model under the lens", "这个模型的权重放大图",
        ))  # fmt: skip
    own = _bits_of(row["scheme"], facts["bits_quantized"] or 4)
    bits = min((rounded["bits"] for rounded in row["rounded"]), key=lambda b: abs(b - own))
    said = [
        tag("p", say(
            "{bits} bits: {count} levels. These weights are then off by {error} %, root mean square, of their size.",
            "{bits} 位:{count} 个取值。这些权重的均方根误差为其大小的 {error} %。",
            bits=tag("b", r["bits"]), count=len(r["levels"]), error=short(100 * r["error"]),
        ), data_bits=r["bits"])
        for r in row["rounded"]
    ]  # fmt: skip
    slider = tag(
        "div", tag("label", say("bits", "位数"), for_="bits"),
        Markup(f'<input type="range" id="bits" min="2" max="8" step="1" value="{bits}" aria-describedby="lens-title">'),
        class_="slider", hidden=True,
    )  # fmt: skip
    caption = tag("figcaption", say(
        "{n} weights of {tensor}: how many lie where, and the levels (lines) that they are moved to. Plain "
        "rounding with one "
        "scale for all of them; the model itself is in {scheme}.",
        "{tensor} 中的 {n} 个权重:柱子是分布,竖线是允许的取值。这里用同一把尺子直接舍入;模型本身用的是 {scheme}。",
        n=len(row["weights"]), tensor=tag("code", row["tensor"]), scheme=tag("code", row["scheme"]),
    ), id="lens-title")  # fmt: skip
    figure = tag(
        "figure", caption, charts.lens(row, bits), slider, tag("div", *said, id="bits-said", aria_live="polite")
    )
    return section(title, story, figure, _further(row))


def _bits_of(scheme: Any, otherwise: float) -> float:
    """Of the codes of a scheme, which the slider begins at; `otherwise` where the record names none of ours."""
    try:
        return parse(str(scheme)).bits
    except SchemeError:
        return otherwise


def _further(row: dict[str, Any]) -> Markup:
    """What each further bit buys, of these weights."""
    rows = [[r["bits"], len(r["levels"]), join(short(100 * r["error"]), " %")] for r in row["rounded"]]
    return table(
        say("What each further bit buys, measured on these weights alone; of the whole model see below.",
            "每多一位能换来什么(只在这些权重上实测);整个模型见下文。"),
        [say("bits", "位数"), say("levels", "取值个数"), say("error", "误差")], rows,
    )  # fmt: skip


def _gained(facts: dict[str, Any]) -> Markup:
    """Disk, memory, speed, energy: before and after, each with its label."""
    before, after = say("before", "之前"), say("after", "之后")

    def both(title: Markup, how: str, old: float, new: float, *shown: str) -> Markup:
        return join(
            tag("h3", title, " ", labelled(how)), charts.bars([(before, old, shown[0]), (after, new, shown[1])])
        )

    parts = [both(say("Room on disk", "硬盘空间"), "measured", facts["bytes_before"], facts["bytes_after"],
                  size(facts["bytes_before"]), size(facts["bytes_after"]))]  # fmt: skip
    if facts["bench"]:
        result = facts["bench"]["result"]
        old, new = result["rows"][:2]
        held = (row["resident_bytes"] for row in (old, new))
        shown = [size(row["resident_bytes"]) for row in (old, new)]
        parts.append(both(say("Weights in memory", "权重占用内存"), "measured", *held, *shown))
        key = "decode_tokens_per_s" if "decode_tokens_per_s" in old else "items_per_s"
        title = say("Words a second", "每秒词数") if key.startswith("decode") else say("Sentences a second", "每秒句数")
        parts.append(both(title, "measured", old[key], new[key], short(old[key]), short(new[key])))
        spreads = [markup.spread(row[f"{key}_min"], row[f"{key}_max"]) for row in (old, new)]
        parts.append(tag("p", say(
            "Medians of {n} rounds in turns; before {a}, after {b} from the slowest to the fastest. "
            "Threads: {threads}; device: {device}; machine: {machine}.",
            "轮流运行 {n} 次的中位数;从最慢到最快,之前 {a},之后 {b}。线程数:{threads};设备:{device};机器:{machine}。",
            n=result["repeats"], a=spreads[0], b=spreads[1], threads=result["threads"], device=result["device"],
            machine=markup.machine(facts["bench"].get("machine")),
        ), class_="dim"))  # fmt: skip
        if key.startswith("decode"):
            times = [short(_PAGE_TOKENS / row[key]) for row in (old, new)]
            parts.append(tag("p", say(
                "A page of text ({tokens} tokens) takes {new} s instead of {old} "
                "s.", "写一页文字({tokens} 个词元)用 {new} 秒,原来用 {old} 秒。",
                tokens=_PAGE_TOKENS, old=times[0], new=times[1],
            ), class_="dim"))  # fmt: skip
    elif not facts["unreadable"]:
        parts.append(missing("bench OUT --against MODEL", "memory and speed", "内存和速度"))
    if facts["energy"] or not facts["unreadable"]:
        parts.append(_energy(facts["energy"]))
    return section(say("What was gained", "得到了什么"), *parts)


def _energy(record: dict[str, Any] | None) -> Markup:
    """Joules of a word, with its label; of an estimate its range."""
    title = say("Energy", "能耗")
    if record is None:
        return join(tag("h3", title), missing("energy OUT", "energy", "能耗"))
    result = record["result"]
    joules = result["joules_per_token"]
    if joules is None:
        words = say("At least {j} J for a word: memory and arithmetic alone.", "每个词至少 {j} 焦耳:只算内存和运算。",
                    j=tag("b", short(result["floor_joules_per_token"])))  # fmt: skip
    elif result["how"] == "measured":
        words = say("{j} J for a word, with idle power {idle} J, on {machine}.",
                    "在 {machine} 上每个词 {j} 焦耳,含空闲功耗为 {idle} 焦耳。",
                    j=tag("b", short(joules)), idle=short(result["joules_per_token_with_idle"]),
                    machine=markup.machine(record.get("machine")))  # fmt: skip
    else:
        low, high = map(short, result["joules_per_token_range"])
        words = say("About {j} J for a word on {device}, between {low} and "
                    "{high}.", "在 {device} 上每个词约 {j} 焦耳,介于 {low} 和 {high} 之间。",
                    j=tag("b", short(joules)), device=result["device"], low=low, high=high)  # fmt: skip
    return join(tag("h3", title, " ", labelled(result["how"])), tag("p", words))


def _unsaid(facts: dict[str, Any]) -> Markup:
    """What a reader must not conclude."""
    result = lost.result(facts)
    about = say("The loss was measured on "
                "{text}; other topics can lose more. ", "损失只在 {text} 上测过;别的领域可能损失更多。",
                text=tag("code", result["text"])) if result else Markup("")  # fmt: skip
    title = say("What this page does not say", "本页没有说的")
    if facts["unreadable"]:
        return section(title, tag("p", say(
            "A small error of the weights is not a small error of the answers: to know that takes pictures, or sounds, "
            "and a task.",
            "权重误差小不等于回答误差小:那需要图片或声音,还需要具体任务。",
        )))  # fmt: skip
    return section(title, tag("p", about, say(
        "“The same next word” is not “the same answer”: small differences add up in long texts. Long "
        "contexts, other languages and "
        "tasks were not tested. On other machines speed and energy differ.",
        "“下一个词相同”不等于“答案相同”:长文里小差别会累积。没有测长上下文、其他语言和具体任务。换一台机器,速"
        "度和能耗会不同。",
    )))  # fmt: skip
