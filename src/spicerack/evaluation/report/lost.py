"""What was lost: a hundred dots, passages with the choices of both models, sentences that moved apart or together."""

from __future__ import annotations

from typing import Any

from spicerack.evaluation.report import charts
from spicerack.evaluation.report.markup import (
    Markup,
    hundred,
    join,
    math_floor,
    missing,
    say,
    section,
    short,
    table,
    tag,
    text,
)  # fmt: skip

_LONGEST = 400
"""Characters of a stranger's text that are shown."""
COMMAND = "eval OUT --against MODEL --text FILE"


def result(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the loss: what eval left, else the check behind quantize; None where neither is there."""
    record = facts["eval"]
    figures: dict[str, Any] | None = record["result"] if record else facts["check"]
    return figures


def lost(facts: dict[str, Any]) -> Markup:
    """The section."""
    title, figures = say("What was lost", "失去了什么"), result(facts)
    if figures is None and facts["unreadable"]:
        return section(title, _of_pictures(facts))
    if figures is None:
        chosen = measured_for_budget(facts)
        told = [] if chosen is None else [_of_budget(facts["sensitivity"]["metric"], chosen)]
        return section(title, *told, missing(COMMAND, "next words and examples", "下一个词和例句"))
    parts = _decoder(figures) if "top1_agreement" in figures else _encoder(figures)
    record = facts["eval"]
    if record is None:
        parts.append(tag("p", say(
            "This is the short check behind quantize. More text, examples and pictures come from {command}",
            "这是量化后自动做的简短检查。更多文本、例句和图由此命令得到:{command}",
            command=tag("code", f"spicerack {COMMAND}"),
        ), class_="none"))  # fmt: skip
    else:
        parts += _examples(record.get("examples", []))
    return section(title, *parts)


def measured_for_budget(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The last round of a run with a budget, which measured this folder; None where there was none."""
    known = facts["sensitivity"]
    last: dict[str, Any] | None = known["rounds"][-1] if known and known["rounds"] else None
    return last


def _of_budget(metric: str, last: dict[str, Any]) -> Markup:
    """What a run with a budget measured of what it chose."""
    unit = say("nats of KL per token", "每词元 KL(nat)") if metric == "kl" else say("1 - cosine", "1 - 余弦")
    rise = last["rise"]
    doubt = Markup("") if rise is None else say(
        " Where the original hesitates between 100 next words, this model does between {n} ({low} to {high}).",
        "原模型在 100 个“下一个词”之间犹豫的地方,这个模型在 {n} 个之间犹豫({low} 到 {high})。",
        n=tag("b", f"{100 * (1 + rise[0]):.1f}"), low=f"{100 * (1 + rise[1]):.1f}", high=f"{100 * (1 + rise[2]):.1f}",
    )  # fmt: skip
    return tag("p", say(
        "When its numbers were chosen its loss was measured on {n} words held out: {loss}, between {low} and {high} "
        "(95 % interval; {unit}), where 0 is the same model and 1 another one.",
        "选定数制时,在留出的 {n} 个词上实测了损失:{loss},在 {low} 到 {high} 之间(95 % 区间;{unit});0 表示完全相同,1 "
        "就是另一个模型了。",
        n=f"{last['tokens']:,}", loss=tag("b", short(last["measured"])), low=short(last["interval"][0]),
        high=short(last["interval"][1]), unit=unit,
    ), doubt)  # fmt: skip


def _of_pictures(facts: dict[str, Any]) -> Markup:
    """Of a model that reads no text: that nothing here measures its answers, and what is known."""
    return tag("p", say(
        "How its answers changed is not known: the model {reason}, and what is here compares answers to text alone. "
        "Known is by how much each weight moved: below, and layer by layer for experts.",
        "它的回答变了多少还不知道:这个模型不读文本({reason}),而这里只会比较对文本的回答。"
        "已知的是每个权重移动了多少:见下文和专家部分。", reason=facts["unreadable"],
    ), class_="none")  # fmt: skip


def _decoder(figures: dict[str, Any]) -> list[Markup]:
    """A hundred dots and what they mean."""
    ends = figures.get("top1_agreement_ci95")
    between = Markup("") if ends is None else say(
        " On other text of this kind it would be between {low} and {high} (95 % interval).",
        "换成同类的其他文本,应在 {low} 到 {high} 之间(95 % 区间)。", low=hundred(ends[0]), high=hundred(ends[1]),
    )  # fmt: skip
    return [
        charts.dots(int(math_floor(100 * figures["top1_agreement"], 0))),
        tag("p", say(
            "Each dot is one in a hundred next words; filled: both models pick the same one ({n} of 100). "
            "Measured on {tokens} words of {text}.",
            "每个圆点代表一百个“下一个词”之一;实心:两个模型选了同一个({n} / 100)。在 {text} 的 {tokens} 个词上"
            "实测。",
            n=tag("b", hundred(figures["top1_agreement"])), tokens=f"{figures['tokens']:,}",
            text=tag("code", figures["text"]),
        ), between),
        tag("p", say("A word here is a token: about three quarters of an English word, or one Chinese character "
                     "and a bit.",
                     "这里的“词”指词元:大约是四分之三个英文词,或一个多汉字。"), class_="dim"),
        _yardstick(figures),
    ]  # fmt: skip


def _encoder(figures: dict[str, Any]) -> list[Markup]:
    """How alike both models' embeddings are."""
    ends = figures.get("cosine_mean_ci95")
    between = Markup("") if ends is None else say(
        " On other sentences of this kind the average would be between {low} and {high} (95 % interval).",
        "换成同类的其他句子,平均值应在 {low} 到 {high} 之间(95 % 区间)。",
        low=f"{math_floor(ends[0], 5):g}", high=f"{math_floor(ends[1], 5):g}",
    )  # fmt: skip
    floor = figures["cosine_noise_floor"]
    cast = Markup("") if floor is None else say(
        " A plain cast to bfloat16, which everybody accepts, leaves them {floor} alike.",
        "人人接受的 bfloat16 转换后,相似度为 {floor}。", floor=f"{math_floor(floor, 5):g}",
    )  # fmt: skip
    return [tag("p", say(
        "Sentences were turned into numbers by both models: {mean} alike on average, {least} the least, "
        "where 1 is the same; {n} sentences.",
        "两个模型把句子变成数字:平均相似度 {mean},最低 {least}(1 为完全相同);共 {n} 句。",
        mean=tag("b", f"{math_floor(figures['cosine_mean'], 5):g}"), least=f"{math_floor(figures['cosine_min'], 5):g}",
        n=figures["sentences"],
    ), cast, between)]  # fmt: skip


def _yardstick(figures: dict[str, Any]) -> Markup:
    """The loss beside what a cast to bfloat16 costs, which everybody accepts."""
    floor, mean = figures["kl_noise_floor"], figures["kl_mean"]
    if not floor:
        return tag(
            "p",
            say("There is no yardstick: the noise floor was not measured.", "没有标尺:未测噪声下限。"),
            class_="dim",
        )
    return join(
        charts.scale(floor, mean),
        tag("p", say(
            "How far predictions moved, on a line where each step is ten times the one before. A plain cast to "
            "bfloat16, which everybody accepts, moves them by {floor} on this text; this model by {mean} (nats of KL "
            "per word). At 1 they would be two different models.",
            "预测移动了多远:这条线上每一格是前一格的十倍。人人接受的 bfloat16 转换在这段文本上移动 {floor};这个模型"
            "移动 {mean}(每词 KL,单位 nat)。到 1 时,就是两个不同的模型了。",
            floor=short(floor), mean=tag("b", short(mean)),
        ), class_="dim"),
    )  # fmt: skip


# ---- examples --------------------------------------------------------------------------------------------------------


def _examples(examples: list[dict[str, Any]]) -> list[Markup]:
    """The typical one first: it is what a reader will meet."""
    passages = [example for example in examples if "tokens" in example]
    pairs = [example for example in examples if "tokens" not in example]
    ordered = sorted(passages, key=lambda passage: passage["which"] != "typical")
    return [*map(_passage, ordered), *([_pairs(pairs)] if pairs else [])]


def _passage(passage: dict[str, Any]) -> Markup:
    """A passage with the places marked at which the choices differ, then the likeliest words at one of them."""
    typical = passage["which"] == "typical"
    title = say("A typical passage", "典型的一段") if typical else say("The worst passage", "最差的一段")
    tokens = passage["tokens"]
    differ = sum(token["original"] != token["small"] for token in tokens)
    marked = [
        tag("mark", token["text"]) if token["original"] != token["small"] else text(token["text"]) for token in tokens
    ]
    told = say(
        "Text as it was read; marked: before these words both models would have said something else than each other "
        "({n} of {all}). Grey stands before it.",
        "读到的原文;标出的地方:在这些词之前,两个模型的首选不同({n} / {all})。灰色是前文。",
        n=differ, all=len(tokens),
    )  # fmt: skip
    writes = [
        tag("p", label, tag("code", passage[key][:_LONGEST].rstrip(), class_="said"))
        for label, key in (
            (say("The original goes on: ", "原模型接着写:"), "original_writes"),
            (say("The small one goes on: ", "小模型接着写:"), "small_writes"),
        )
    ]
    quoted = tag("blockquote", tag("span", passage["before"][-_LONGEST:].lstrip("\n"), class_="dim"), *marked)
    return join(tag("h3", title), quoted, tag("p", told, class_="dim"), *writes, _choices(passage))


def _choices(passage: dict[str, Any]) -> Markup:
    """The likeliest next words of both models, side by side, at the place of the passage where they differ most."""
    at = passage["tokens"][passage["at"]]
    rows = [
        [i, _word(ours), _share(ours), _word(theirs), _share(theirs)]
        for i, (ours, theirs) in enumerate(zip(passage["original"], passage["small"], strict=False), start=1)
    ]
    caption = say(
        "What both expect at one place, before {word}: their likeliest next words, of 100 chances. Here they differ "
        "most in this passage (KL {kl}).",
        "在 {word} 之前,两个模型各自认为最可能的下一个词(每 100 次机会)。这是这一段里差别最大的地方(KL {kl})。",
        word=tag("code", visible(at["text"])), kl=short(at["kl"]),
    )  # fmt: skip
    head = [say("rank", "名次"), say("original", "原模型"), say("of 100", "每 100"), say("small", "小模型"),
            say("of 100", "每 100")]  # fmt: skip
    return table(caption, head, rows, wide=False)


def _word(choice: dict[str, Any]) -> Markup:
    return tag("code", visible(choice["text"]))


def _share(choice: dict[str, Any]) -> str:
    return short(100 * choice["share"])


def visible(token: str) -> str:
    """A token with its line ends and spaces as signs; cut where it is long."""
    return token[:_LONGEST].replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(" ", "\N{OPEN BOX}")


def _pairs(pairs: list[dict[str, Any]]) -> Markup:
    """Sentences whose likeness moved most, and a pair in the middle."""
    rows = [
        [
            join(tag("q", pair["a"][:_LONGEST]), " ", tag("q", pair["b"][:_LONGEST])),
            say("typical", "典型") if pair["typical"] else say("moved most", "变化最大"),
            f"{pair['before']:.2f}", f"{pair['after']:.2f}",
        ]
        for pair in sorted(pairs, key=lambda pair: not pair["typical"])
    ]  # fmt: skip
    caption = say(
        "How alike two sentences are to each model, where 1 is the same and 0 unrelated: a search ranks by this.",
        "两个句子在各模型看来有多相似(1 为相同,0 为无关):搜索就按它排序。",
    )
    return table(
        caption,
        [say("sentences", "句子"), say("pair", "句对"), say("original", "原模型"), say("small", "小模型")],
        rows,
    )


def interval(ends: list[float] | None, digits: int | None = None) -> Markup:
    """The ends of a 95 % interval, or that there is none. digits: behind the point; None: three in all."""
    if ends is None:
        return say("none measured", "未测")
    low, high = (short(end) if digits is None else f"{math_floor(end, digits):g}" for end in ends)
    return text(f"{low} \N{EN DASH} {high}")
