"""The checker finds what is too long, and says where."""

from __future__ import annotations

from lab.house import breaches


def test_long_function_and_file_are_found(tmp_path):
    path = tmp_path / "long.py"
    body = "".join(f"    x = {index}\n" for index in range(60))
    path.write_text(f"def short():\n    pass\n\n\ndef long():\n{body}" + "\n" * 500)
    assert [breach.partition(": ")[0] for breach in breaches(path)] == [f"{path}:1", f"{path}:5"]


def test_lengths_at_the_limit_pass(tmp_path):
    path = tmp_path / "fits.py"
    body = "".join(f"    x = {index}\n" for index in range(59))
    path.write_text((f"async def fits():\n{body}" + "\n" * 500)[: -(60 + 0)])
    assert path.read_text().count("\n") == 500
    assert list(breaches(path)) == []
