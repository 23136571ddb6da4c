"""For experts: every figure with its interval and how it was measured, layer by layer, and where it is from."""

from __future__ import annotations

import json
from typing import Any

from spicerack.evaluation.report import bits, lost
from spicerack.evaluation.report.markup import Markup, join, math_floor, say, short, size, spread, table, tag, whole


def sections(facts: dict[str, Any]) -> list[Markup]:
    """All of them."""
    parts = [tag("h2", say("For experts", "给行家"))]
    figures = lost.result(facts)
    if figures is not None:
        parts.append(_loss(figures))
    if facts["bench"]:
        parts.append(_speeds(facts["bench"]["result"]))
    parts.append(_types(facts))
    if not facts["unreadable"]:
        parts += [tag("h3", say("What each part would lose", "各部分的敏感度")), bits.sensitivity(facts)]
    kernels = facts["eval"].get("kernels") if facts["eval"] else None
    if kernels:
        parts.append(_kernels(kernels))
    parts.append(_tensors(facts))
    if facts["events"]:
        rows = [[event["tensor"], event["event"]] for event in facts["events"]]
        parts.append(
            table(say("What happened on the way", "过程记录"), [say("tensor", "张量"), say("event", "事件")], rows)
        )
    return [tag("section", *parts), _origin(facts)]


def _kernels(kernels: list[list[Any]]) -> Markup:
    """What each kind of layer was computed with, where the loss was measured."""
    rows = [[layers, kernel, whole(count)] for layers, kernel, count in kernels]
    return table(
        say("Kernels: what each kind of layer was multiplied with where the loss was measured.",
            "计算核:测损失时,每类层用什么相乘。"),
        [say("layers", "层"), say("kernel", "计算核"), say("count", "个数")], rows,
    )  # fmt: skip


def _loss(result: dict[str, Any]) -> Markup:
    """Every figure of the evaluation."""
    how = say("next tokens, greedy", "贪心的下一个词元")
    if "kl_mean" in result:
        windows = say("Student's t over {n} windows of {w} tokens", "对 {n} 个各 {w} 词元的窗口用 t 分布",
                      n=result["windows"], w=result["window"])  # fmt: skip
        rows = [
            [say("KL, mean, nats per token", "平均 KL(nat/词元)"), short(result["kl_mean"]),
             lost.interval(result["kl_mean_ci95"]), windows],
            [say("KL, 99.9th percentile", "KL 99.9 分位"), short(result["kl_p999"]), lost.interval(None),
             say("of all tokens; a quantile of so few has no useful interval", "全部词元;样本太少,分位数没有可用区间")],
            [say("KL of a cast to bfloat16", "bfloat16 转换的 KL"), short(result["kl_noise_floor"]),
             lost.interval(result.get("kl_noise_floor_ci95")), say("the beginning of the same text", "同一文本的开头")],
            [say("perplexity", "困惑度"), short(result["perplexity"]), lost.interval(result.get("perplexity_ci95")),
             say("exp of the interval of the mean loss", "平均损失区间取指数")],
            [say("perplexity, original", "原模型困惑度"), short(result["perplexity_reference"]),
             lost.interval(result.get("perplexity_reference_ci95")), say("the same windows", "同样的窗口")],
            [say("same top token, share", "首选一致(比例)"), short(result["top1_agreement"]),
             lost.interval(result.get("top1_agreement_ci95")), how],
        ]  # fmt: skip
    else:
        floor = result["cosine_noise_floor"]
        over = say("Student's t over {n} sentences", "对 {n} 句用 t 分布", n=result["sentences"])
        rows = [
            [say("cosine, mean", "平均余弦"), f"{math_floor(result['cosine_mean'], 5):g}",
             lost.interval(result.get("cosine_mean_ci95"), 5), over],
            [say("cosine, least", "最低余弦"), f"{math_floor(result['cosine_min'], 5):g}", lost.interval(None),
             say("a single sentence", "单独一句")],
            [say("cosine of a cast to bfloat16", "bfloat16 转换的余弦"), "-" if floor is None else f"{floor:.5f}",
             lost.interval(result.get("cosine_noise_floor_ci95"), 5), over],
            [say("Spearman", "Spearman"), short(result["spearman"]), lost.interval(None),
             say("of all pairs, which depend on each other", "所有句对,彼此不独立")],
        ]  # fmt: skip
    return table(
        say("Loss, against the original in float32; computed with {compute}; {tokens} tokens of {text}.",
            "损失:与 float32 原模型相比;计算核 {compute};{text} 的 {tokens} 个词元。",
            compute=result["compute"], tokens=whole(result["tokens"]), text=result["text"]),
        [say("figure", "指标"), say("value", "值"), say("95 % interval", "95 % 区间"), say("how", "方法")], rows,
    )  # fmt: skip


def _speeds(result: dict[str, Any]) -> Markup:
    """Every speed with its spread, of each model."""
    rows = []
    for row in result["rows"]:
        for key in [key for key in row if f"{key}_min" in row]:
            label = key.replace("_per_s", "/s").replace("_", " ")
            rows.append([
                join(row["name"], ": ", label), short(row[key]), spread(row[f"{key}_min"], row[f"{key}_max"]),
                row["compute"], size(row["resident_bytes"]),
            ])  # fmt: skip
    return table(
        say("Speed: median and the whole spread of {n} rounds, models in turns, {threads} threads, {device}. "
            "Kernels as named.",
            "速度:{n} 轮的中位数与全部范围,模型轮流运行,{threads} 个线程,{device}。计算核见表。",
            n=result["repeats"], threads=result["threads"], device=result["device"]),
        [say("figure", "指标"), say("median", "中位数"), say("least to most", "最小至最大"),
         say("computed with", "计算核"),
         say("memory", "内存")], rows,
    )  # fmt: skip


def _types(facts: dict[str, Any]) -> Markup:
    """The ledger by kinds of layers."""
    rows = [
        [row["layers"], row["numbers"], whole(row["count"]), size(row["bytes_before"]), size(row["bytes_after"]),
         short(row["error"])]
        for row in facts["types"]
    ]  # fmt: skip
    return table(
        say("The ledger by kinds of layers; error: of rounding, relative, root mean square; from the run itself, "
            "without interval.",
            "按层类型的账目;误差:舍入的相对均方根误差;来自本次运行,无区间。"),
        [say("layers", "层"), say("numbers", "数制"), say("count", "个数"), say("before", "之前"), say("after", "之后"),
         say("error", "误差")], rows,
    )  # fmt: skip


def _tensors(facts: dict[str, Any]) -> Markup:
    """Tensor by tensor, the largest first."""
    rows = [
        [row["tensor"], row["scheme"] or say("as it was", "保持原样"),
         " \N{MULTIPLICATION SIGN} ".join(map(str, row["shape"])), short(row["bits"]),
         size(row["bytes_before"]), size(row["bytes_after"]), short(row["error"])]
        for row in facts["tensors"]
    ]  # fmt: skip
    left = facts["tensors_left_out"]
    more = tag("p", say("{n} smaller tensors are not listed; they take "
                        "{bytes}.", "另有 {n} 个较小的张量未列出,共 {bytes}。",
                        n=whole(left), bytes=size(facts["bytes_left_out"])),
               class_="dim") if left else Markup("")  # fmt: skip
    listed = table(
        say("{n} tensors, the largest first.", "{n} 个张量,从大到小。", n=whole(facts["tensors_in_all"])),
        [say("tensor", "张量"), say("numbers", "数制"), say("shape", "形状"), say("bits", "位数"),
         say("before", "之前"),
         say("after", "之后"), say("error", "误差")], rows,
    )  # fmt: skip
    inner = tag("summary", say("Tensor by tensor", "逐个张量"))
    return join(tag("details", inner, listed, more))


def _origin(facts: dict[str, Any]) -> Markup:
    """How it was made and measured, in the words of the records themselves."""
    run = facts["run"] or {}
    command = run.get("command")
    parts: list[Markup] = []
    if isinstance(command, list):
        parts.append(
            tag("p", say("Made by:", "生成命令:"), " ", tag("code", " ".join(["spicerack", *map(str, command[1:])])))
        )
    if not facts["run"]:
        parts.append(tag("p", say(
            "Missing: how long it took and on which machine (run.json).", "缺少:用时和所用机器(run.json)。"),
                         class_="none"))  # fmt: skip
    if not facts["identity"].get("calibration"):
        parts.append(tag("p", say("No text was used to calibrate it.", "没有用文本校准。")))
    shown = {"identity": facts["identity"], "run": facts["run"]}
    for name in ("eval", "bench", "energy"):
        record = facts[name]
        if record:
            shown[name] = {key: value for key, value in record.items() if key not in ("result", "kernels", "examples")}
    inner = tag("summary", say("Hashes, versions, machines, calibration", "哈希、版本、机器、校准"))
    parts.append(tag("details", inner, tag("pre", json.dumps(shown, indent=1, ensure_ascii=False), tabindex=0)))
    return tag("section", tag("h2", say("How to check this page", "如何复核")), *parts)
