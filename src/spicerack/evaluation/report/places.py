"""Will it run on my phone, laptop, card? A planner's answers, as a table."""

from __future__ import annotations

from typing import Any

from spicerack.evaluation.report.markup import Markup, labelled, say, section, short, size, table, tag, whole


def places(facts: dict[str, Any]) -> Markup:
    """The section; nothing where no planner knows the model."""
    rows = facts["devices"]
    if not rows:
        return Markup("")
    writes = any(row.get("tokens_per_s") for row in rows)
    head = [say("device", "设备"), say("does it fit?", "放得下吗?"), say("needs", "需要"), say("left", "剩余")]
    if writes:
        head += [say("words a second", "每秒词数"), say("longest text", "最长文本")]
    caption = say(
        "For texts of {context} words, with the program named below the device. Memory: from the files and the "
        "program's rules. Speed: from the bytes that are read for each word; a dash where no measurement is known to "
        "judge it by.",
        "按 {context} 个词的文本计算,程序名写在设备下面。内存:由文件大小和程序规则算出。速度:由每个词要读的字节数"
        "估算;没有可比的实测时写短横。",
        context=whole(rows[0]["context"]),
    )  # fmt: skip
    return section(
        say("Will it run on …?", "能在……上运行吗?"),
        tag("p", labelled("estimated"), " ", say(
            "Other programs need a file of their own: {command} makes it, of about the same size.",
            "其他程序需要自己的文件格式:{command} 可以转换,大小差不多。", command=tag("code", "spicerack export"),
        )),
        table(caption, head, [_row(row, writes) for row in rows]),
    )  # fmt: skip


def _row(row: dict[str, Any], writes: bool) -> list[Any]:
    """A device."""
    name = Markup(f"{tag('span', row['device'])}{tag('small', row['engine'], class_='under')}")
    blank = ["\N{EN DASH}"] * (4 if writes else 2)
    if "refused" in row:
        return [name, say("no: {why}", "不能:{why}", why=row["refused"]), *blank]
    fits = say("yes", "能") if row["fits"] else say("no, {n} too little", "不能,差 {n}", n=size(-row["spare_bytes"]))
    spare = size(row["spare_bytes"]) if row["fits"] else "\N{EN DASH}"
    cells = [name, tag("b", fits), size(row["memory_bytes"]), spare]
    if writes:
        longest = row["longest_context"]
        cells += [short(row["tokens_per_s"]), "\N{EN DASH}" if longest is None else whole(longest)]
    return cells
