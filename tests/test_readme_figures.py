"""The README's figures are those of bench/results, rounded as they are printed."""

import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text()
FIGURES = re.search(r"<!-- figures: begin.*?-->\n(.*)<!-- figures: end -->", README, re.DOTALL)[1]


def records(group):
    return {entry["case"]: entry for entry in json.loads((RESULTS / f"nvidia-h200-{group}.json").read_text())}


def assert_printed(printed, values, where):
    """Each printed figure is the value, rounded to its digits."""
    assert len(printed) == len(values), where
    for text, value in zip(printed, values, strict=True):
        if value is None:
            assert text == "-", where
            continue
        number = text.replace(",", "")
        unit = 10.0 ** -len(number.partition(".")[2])
        assert abs(float(number) - value) <= unit / 2 * (1 + 1e-6), f"{where}: {text}, but measured {value}"


def tables():
    """Of each table between the marks: its header's first word, the text before it, and its rows."""
    found, before = [], ""
    for paragraph in FIGURES.split("\n\n"):
        if paragraph.startswith("|"):
            header, _line, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                                    for line in paragraph.strip().splitlines())
            found.append((header[0].split()[0], before, rows))
        before = paragraph
    return found


def teraflops(entry):
    """fa3's and cuDNN's."""
    return entry["tflops"], entry["tflops"] * entry["us"] / entry["peers"]["cudnn"]


def square_rows(group, dtype, rows):
    """(label, printed figures, measured figures) of rows "head dim, length", full and causal."""
    entries = records(group)
    for label, *cells in rows:
        head_dim, length = label.split(", ")
        case = f"{dtype} d{head_dim} s{length.replace(',', '')}"
        full, causal = (teraflops(entries[f"{case} {mask}"]) for mask in ("full", "causal"))
        yield f"{group}: {label}", cells, [*full, *causal]


def decode_rows(rows):
    entries = records("decode")
    for label, *cells in rows:
        sequences, keys = re.findall(r"\d+", label.replace(",", ""))
        whole, *paged = (entries[f"bf16 b{sequences} ctx{keys} h64/8 d128 page{page}"] for page in (None, 16, 256))
        yield label, cells, [whole["us"], *(entry["us"] for entry in paged), whole["peers"]["cudnn"]]


def seed_rows(rows):
    entries = {case.partition(" ")[2]: entry for case, entry in records("seed").items()}
    assert {label for label, *_ in rows} == set(entries)
    for label, *cells in rows:
        entry = entries[label]
        yield label, cells, [entry["us"], entry["peers"]["cudnn"], entry["peers"]["fa2"]]


def rows_of(header, before, rows):
    if header == "head":
        group, dtype = {"Forward, bf16:": ("forward", "bf16"), "Forward, fp8 (e4m3):": ("fp8", "e4m3"),
                        "Backward, bf16:": ("backward", "bf16")}[re.search(r"\w+, [^,]+:$", before)[0]]
        return square_rows(group, dtype, rows)
    return {"sequences": decode_rows, "case": seed_rows}[header](rows)


def test_the_tables_are_what_was_measured():
    found = tables()
    assert len(found) == 5
    for table in found:
        for label, printed, measured in rows_of(*table):
            assert_printed(printed, measured, label)


def percent(values):
    """The least and the most of what is more than 1."""
    return [100 * (min(values) - 1), 100 * (max(values) - 1)]


def forward_mean():
    [table] = [table for table in tables() if table[1].endswith("Forward, bf16:")]
    ratios = [measured[i] / measured[i + 1] for _, _, measured in rows_of(*table) for i in (0, 2)]
    return [math.prod(ratios) ** (1 / len(ratios))]


def fp8_losses():
    entries = records("accuracy")
    return [100 * entries[f"e4m3 d128 b1 q128 k{keys} h4 mean1"]["errors"]["none"] for keys in (4096, 16384)]


def fp8_costs():
    entries = records("accuracy")
    times = [entry["times"] for entry in entries.values() if entry["times"]]
    errors = [entry["errors"] for case, entry in entries.items() if "mean1" in case]
    rare, often = (percent([each[keys] / each["none"] for each in times]) for keys in ("2048", "512"))
    return [rare[1], 100 * max(each["2048"] for each in errors), *often, 100 * max(each["512"] for each in errors)]


def in_one_order():
    return [max(entry["deterministic_us"] / entry["us"] for entry in records("backward").values())]


def latent():
    entries = records("mla")
    one_piece, paged, fp8 = ([entries[f"{dtype} b128 ctx8192 page{page} h{heads}"] for heads in (16, 64, 128)]
                             for dtype, page in (("bf16", None), ("bf16", 64), ("e4m3", None)))
    less = [100 * (1 - b["gbs"] / a["gbs"]) for a, b in zip(one_piece, paged, strict=True)]
    share = [b["us"] / a["us"] for a, b in zip(one_piece, fp8, strict=True)]
    few, some, many = one_piece
    return [few["gbs"], some["gbs"], many["tflops"], many["gbs"], min(less), max(less), min(share), max(share)]


def pages():
    """Of pages of multiples of 8 rows, and of others where keys are many, and few."""
    entries, taken = records("decode"), {"multiples": [], "others": [], "few": []}
    for case, entry in entries.items():
        sequences, keys, page = re.search(r"b(\d+) ctx(\d+) .* page(\w+)$", case).groups()
        if page != "None":
            kind = "multiples" if int(page) % 8 == 0 else "few" if int(sequences) * int(keys) < 10_000 else "others"
            taken[kind].append(entry["us"] / entries[case.replace(f"page{page}", "pageNone")]["us"])
    return [percent(taken["multiples"])[1], percent(taken["others"])[1], max(taken["few"])]


def overhead():
    plain, given = records("overhead").values()
    return [plain["us"], given["us"], plain["peers"]["cudnn"]]


@pytest.mark.parametrize(("sentence", "measured"), [
    (r"In the geometric mean (\S+) times as fast as cuDNN", forward_mean),
    (r"with mean 1, (\S+)% over 4,096 keys and (\S+)% over 16,384\.", fp8_losses),
    (r"every 2,048 keys, that costs up to (\S+)% of the time and leaves an error of (\S+)% at any length; "
     r"every 512 keys, (\S+) to (\S+)% and (\S+)%:", fp8_costs),
    (r"With `deterministic=True` it takes up to (\S+) times as long", in_one_order),
    (r"with 16 query heads the cache is read at (\S+) GB/s, with 64 at (\S+), with 128, where products are the "
     r"limit \((\S+) TFLOP/s\), at (\S+); from pages of 64 rows at (\S+) to (\S+)% less\. In fp8, half the bytes, "
     r"it takes (\S+) to (\S+) of the time\.", latent),
    (r"multiples of 8 rows decode within (\S+)% of one piece, others within (\S+)%, of a few thousand keys in all "
     r"up to (\S+) times as long \(16 bits\)", pages),
    (r"call with PyTorch arrays is (\S+) µs, with `out=` (\S+) \(PyTorch's own attention on the same machine: "
     r"(\S+)\)", overhead),
], ids=lambda value: getattr(value, "__name__", ""))
def test_the_sentences_are_what_was_measured(sentence, measured):
    found = re.search(sentence, " ".join(README.split()))
    assert found, "the README has another sentence"
    assert_printed(found.groups(), measured(), found[0])
