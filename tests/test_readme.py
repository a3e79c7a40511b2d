"""What the README shows of the code runs as it stands there."""

import re

from conftest import ROOT


def test_the_lines_of_python_load_ask_and_look(tiny_folder, capsys):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert '"out/quickstart"' in code
    exec(code.replace('"out/quickstart"', repr(str(tiny_folder))), {})
    assert "indices=tensor" in capsys.readouterr().out


def test_it_stays_short():
    assert (ROOT / "README.md").stat().st_size <= 9000
