"""What docs/measured holds is what scripts/measure_distil.py would measure."""

from __future__ import annotations

import json

from scripts.measure_distil import AIMS, INTERPOLATIVE, MEASURED, rows


def test_every_row_was_measured_with_the_flags_that_the_script_gives() -> None:
    flags = {name: given for members in rows().values() for name, given in members.items()}
    measured = {path.stem: json.loads(path.read_text()) for path in MEASURED.glob("*.json")}
    found = {name: result["flags"] for name, result in measured.items() if "flags" in result}
    assert found and found.keys() <= flags.keys() | set(INTERPOLATIVE)
    assert {n: f for n, f in found.items() if n in flags} == {
        n: flags[n] for n in found.keys() & flags
    }
    assert {name for _, _, names in AIMS.values() for name in names} <= flags.keys()
