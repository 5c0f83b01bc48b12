"""aiperf against a served model: every request is answered and counted.

Arguments: the address with /v1, the model, the folder of its tokenizer, a folder to work in.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

base, model, tokenizer, folder = sys.argv[1:]
work = Path(folder)
# it takes tokenizers from the hub's cache only
commit = "0" * 40
cached = work / "hub" / "models--served--model"
shutil.copytree(tokenizer, cached / "snapshots" / commit)
(cached / "refs").mkdir()
(cached / "refs" / "main").write_text(commit)
for endpoint in ("chat", "completions"):
    out = work / endpoint
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "aiperf"), "profile", "-m", model),
            *("-u", base.removesuffix("/v1"), "--endpoint-type", endpoint, "--streaming"),
            *("--request-count", "6", "--concurrency", "2", "--tokenizer", "served/model"),
            *("--isl", "16", "--osl", "8", "--ui", "none", "--artifact-dir", str(out)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=work,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(work)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == 6, report
    assert not report.get("error_summary"), report
print("ok")
