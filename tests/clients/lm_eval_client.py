"""lm-eval against a served model: a multiple-choice task and one that generates.

Arguments: the address with /v1, the model, the folder of its tokenizer, a folder to work in.
"""

import json
import subprocess
import sys
from pathlib import Path

base, model, tokenizer, folder = sys.argv[1:]
work = Path(folder)
QUESTIONS = [
    {"question": f"{a} and {b} are", "choices": [str(a + b), str(a * b + 7)], "answer": 0}
    for a in range(1, 5)
    for b in range(1, 3)
]
data = work / "questions.jsonl"
data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
SOURCE = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
(work / "choose.yaml").write_text(
    f"task: choose\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    f"metric_list: [{{metric: acc}}]\n{SOURCE}"
)
(work / "write.yaml").write_text(
    f"task: write\noutput_type: generate_until\ndoc_to_target: '{{{{choices[0]}}}}'\n"
    f"generation_kwargs: {{until: ['\\n'], max_gen_toks: 8, do_sample: false}}\n"
    f"metric_list: [{{metric: exact_match}}]\n{SOURCE}"
)
arguments = (
    f"model={model},base_url={base}/completions,tokenizer={tokenizer},"
    "num_concurrent=2,max_retries=1,tokenized_requests=False"
)
done = subprocess.run(
    [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", arguments, "--tasks", "choose,write", "--include_path", str(work)),
        *("--output_path", str(work / "results")),
    ],
    capture_output=True,
    text=True,
    check=False,
)
assert done.returncode == 0, done.stdout + done.stderr
(found,) = (work / "results").rglob("results_*.json")
results = json.loads(found.read_text())
assert results["n-samples"]["choose"]["effective"] == len(QUESTIONS)
assert 0 <= results["results"]["choose"]["acc,none"] <= 1
assert "exact_match,none" in results["results"]["write"]
print("ok")
