"""Run nvcc on one file, and refuse what ptxas reports only as information.

ptxas tells the two worst faults of a Hopper kernel, serialised wgmma and an ignored setmaxnreg, in info lines with
exit code 0. Here any C75xx message fails the build, and so do spills and local memory that resources.csv does not list.

    compile_kernel.py compile RESOURCES.csv OBJECT nvcc ARGUMENTS...    one file; writes OBJECT.resources beside it,
                                                                        with a line for each tile and each kernel
                                                                        of quantisation in it
    compile_kernel.py check RESOURCES.csv BUILD_FOLDER                  the table is what was built: CI's question
    compile_kernel.py update RESOURCES.csv BUILD_FOLDER                 write the table anew, reasons kept

The last two ask the installed fa3 for each kernel's shared memory, so install what was built in that folder first.
"""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

MEASURED = ["kernel", "registers", "stack", "spill_stores", "spill_loads"]
LIMITS = MEASURED[2:]
DTYPES = {"Float16": "fp16", "BFloat16": "bf16", "Float8E4M3": "e4m3"}
COLUMNS = [*MEASURED, "shared_memory", "reason"]


def read_table(path):
    with open(path, newline="") as file:
        return {row["kernel"]: row for row in csv.DictReader(file)}


def by_kernel(report, file):
    """The report cut up by kernel, and each one's name in the table. Kernels of a tile share one: the worst counts."""
    parts = {}
    for part in re.split(r"(?=.*Compiling entry function)", report):
        entry = re.search(r"Compiling entry function '(\w+)'", part)
        kernel = name_of(entry[1] if entry else "", file)
        parts[kernel] = parts.get(kernel, "") + part
    return {kernel: part for kernel, part in parts.items() if "Used " in part}


def name_of(entry, file):
    """A kernel's name, from its mangled one: a tile's, whatever file it is in, or the file's and a shape's."""
    tile = re.search(r"(For|Back)wardTraitsINS_\d+(\w+?)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E(?:Lb(\d)ELb(\d)E)?", entry)
    if tile:
        way, element, head_dim, head_dim_v, rows, keys, has_qv, turned = tile.groups()
        kind = "_qv" if has_qv == "1" else "_turned" if turned == "1" else ""
        return f"{way.lower()}ward_{DTYPES[element]}_d{head_dim}x{head_dim_v}{kind}_{rows}x{keys}"
    return file + apart(entry)


def apart(entry):
    """What sets a kernel apart from others of its file: a shape of quantisation, or nothing."""
    if shape := re.search(r"QuantizeTraitsI\w+?Lb(\d)ELi(\d+)ELi(\d+)E", entry):
        return f"{'_hadamard' * (shape[1] == '1')}{'_stream' * ('stream' in entry)}_{shape[2]}x{shape[3]}"
    if head_dim := re.search(r"RotationTraitsI\w+?Li(\d+)E", entry):
        return f"_{head_dim[1]}"
    return ""


def measured(report, kernel):
    """What `ptxas -v` said of the worst function in this report, as a row of the table."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    worst = [max(map(int, column)) for column in zip(*frames, strict=True)]
    registers = max(map(int, re.findall(r"Used (\d+) registers", report)))
    return dict(zip(MEASURED, [kernel, *map(str, [registers, *worst])], strict=True))


def compile_file(table, target, command):
    file = Path(target).name.split(".")[0]
    done = subprocess.run([*command, "-Xptxas=-v"], stderr=subprocess.PIPE, text=True)
    figures = re.compile(r"ptxas info|\s+\d+ bytes stack frame")
    ordinary = [line for line in done.stderr.splitlines() if not figures.match(line)]
    print(*ordinary, sep="\n", end="\n" if ordinary else "", file=sys.stderr)
    if done.returncode:
        return done.returncode
    if faults := [line for line in done.stderr.splitlines() if "C75" in line]:
        print(f"{file}: ptxas weakened a kernel:", *faults, sep="\n  ", file=sys.stderr)
        return 1
    rows = [measured(part, kernel) for kernel, part in by_kernel(done.stderr, file).items()]
    listed = read_table(table)
    for row in rows:
        allowed = listed.get(row["kernel"], {})
        if any(int(row[name]) > int(allowed.get(name) or 0) for name in LIMITS):
            print(f"{row['kernel']}: {row['stack']} bytes of stack, {row['spill_stores']} + {row['spill_loads']} bytes "
                  f"spilled; {Path(table).name} allows no more than it lists, each with a measured reason",
                  file=sys.stderr)
            return 1
    Path(target + ".resources").write_text("".join(",".join(row.values()) + "\n" for row in rows))
    return 0


def shared_memory():
    """Bytes of dynamic shared memory a thread block, which ptxas cannot know: the installed library tells."""
    from fa3._core import backward_variants, variants

    return {variant["name"]: variant["shared_memory"] for variant in [*variants(), *backward_variants()]}


def collect(folder):
    rows = {}
    dynamic = shared_memory()
    for path in sorted(Path(folder).rglob("*.resources")):
        for figures in csv.reader(path.read_text().splitlines()):
            row = dict(zip(MEASURED, figures, strict=True))
            rows[row["kernel"]] = row | {"shared_memory": dynamic.get(row["kernel"], 0)}
    if not rows:
        sys.exit(f"no kernel was compiled in {folder}")
    return rows


def as_text(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[kernel] for kernel in sorted(rows))
    return text.getvalue()


def main():
    verb, table, place, *command = sys.argv[1:]
    if verb == "compile":
        return compile_file(table, place, command)
    built, listed = collect(place), read_table(table)
    for kernel, row in built.items():
        row["reason"] = listed.get(kernel, {}).get("reason", "")
    if verb == "update":
        Path(table).write_text(as_text(built))
    elif Path(table).read_text() != as_text(built):
        print(f"{table} is not what was built; this is:\n{as_text(built)}"
              f"If that is right, run: python {sys.argv[0]} update {table} {place}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
