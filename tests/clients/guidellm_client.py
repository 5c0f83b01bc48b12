"""guidellm against a served model: every request is answered.

Arguments: the address with /v1, the model, the folder of its tokenizer, a folder to work in.
"""

import json
import subprocess
import sys
from pathlib import Path

base, model, _, folder = sys.argv[1:]
work = Path(folder)
prompts = work / "prompts.jsonl"
question = {"prompt": "How does Psalm 23 begin?", "output_tokens_count": 8}
prompts.write_text("".join(json.dumps(question) + "\n" for _ in range(8)))
backend = f"kind=openai_http,target={base.removesuffix('/v1')},model={model}"
done = subprocess.run(
    [
        *(str(Path(sys.executable).parent / "guidellm"), "run", "--backend", backend),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=6"),
        *("--data", f"kind=json_file,path={prompts}", "--disable-progress"),
    ],
    capture_output=True,
    text=True,
    check=False,
    cwd=work,
)
assert done.returncode == 0, done.stdout + done.stderr
(benchmark,) = json.loads((work / "benchmarks.json").read_text())["benchmarks"]
totals = benchmark["metrics"]["request_totals"]
assert (totals["successful"], totals["errored"]) == (6, 0), totals
print("ok")
