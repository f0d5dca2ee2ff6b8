"""What set-up installs fits together: models and texts are data, and nothing is installed without what it declares."""

from __future__ import annotations

import subprocess
import sys


def test_pip_check():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.stdout.strip() == "No broken requirements found.", done.stdout
