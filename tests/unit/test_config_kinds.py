"""Kinds of configs that teams have, each reduced: what is found in it, what is refused, and what is proposed.

The golden files stand beside the configs: NAME.report and NAME.diff. Write them anew with
`ES_WRITE_GOLDEN=1 python -m pytest tests/unit/test_config_kinds.py`, and read the difference.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from es_megatron import cli
from es_megatron.checks.config_report import Report, Wishes, examine
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config_files.reading import Hints, read
from es_megatron.config_patch.folder import check_folder
from es_megatron.config_patch.writing import patch, unpatch
from es_megatron.errors import ConfigError

RUN = "pretrain_gpt.py --num-layers 2 --seq-length 128 --micro-batch-size 1 --global-batch-size 64 --train-iters 50"
WISHES = Wishes(EvolvedSamplingConfig(), frozenset())
CASES = Path(os.environ.get("ES_CONFIG_CASES", Path(__file__).parents[3] / "shared" / "cases" / "configs"))


GOLDEN = Path(__file__).parent / "golden_kinds"
GOLDEN_CODES = {
    "exported_parts.slurm": 0,
    "appended_command.sh": 0,
    "submitted.sh": 0,
    "pod.yaml": 0,
    "neox.yml": 0,
    "trainer.yaml": 0,
    "braces.yaml": 0,
    "automatic.json": 0,
    "wrapper.sh": 1,
    "two_lengths.sh": 1,
    "one_micro_batch.sh": 1,
    "other_launcher.sh": 1,
    "sentence_pairs.sh": 1,
    "template.json": 2,
    "commented.json": 2,
}


@pytest.mark.parametrize("name", GOLDEN_CODES)
def test_report_and_diff_are_the_golden_ones(name, capsys):
    assert cli.main(["patch", str(GOLDEN / name), "--diff"]) == GOLDEN_CODES[name]
    output = capsys.readouterr()
    for suffix, told in (("report", output.err), ("diff", output.out)):
        path = GOLDEN / f"{name}.{suffix}"
        if os.environ.get("ES_WRITE_GOLDEN") and told:
            path.write_bytes(told.encode())
        assert (path.read_bytes().decode() if path.exists() else "") == told


@pytest.mark.parametrize("name", [name for name, code in GOLDEN_CODES.items() if code == 0])
def test_copies_are_restored_byte_for_byte(name, tmp_path):
    original = (GOLDEN / name).read_bytes()
    (tmp_path / name).write_bytes(original)
    assert cli.main(["patch", str(tmp_path / name), "--in-place"]) == 0
    assert (tmp_path / name).read_bytes() != original
    assert cli.main(["unpatch", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes() == original


def reported(folder: Path, name: str, text: str, hints: Hints | None = None) -> Report:
    (folder / name).write_text(text)
    source = read(folder / name, hints or Hints())
    report = examine(name, source, WISHES)
    if not report.refused:
        patched = patch(source, report.proposal.config)
        assert patched != text
        assert unpatch(source.kind, patched) == (text, True)
    return report


def lines(report: Report) -> str:
    return "\n".join(finding.line() for finding in report.findings)


OTHER_TASKS = {
    "posttrain_gpt.py --stage sft": "post-training",
    "finetune_llama.py --repeated-dataloader": "post-training",
    "train_bert_ds.py": "BERT",
    "my_model.py --bert-no-binary-head --seq-length 128 --num-layers 2": "BERT",
    "pretrain_t5.py --decoder-seq-length 128": "T5",
    "pretrain_vlm.py": "images",
    "examples/multimodal/train.py --freeze-LM": "images",
    "run_generation.py --num-tokens-to-generate 5 --seq-length 128 --num-layers 2": "inference",
    "tasks/main.py --task RACE --seq-length 128 --num-layers 2": "task",
}


@pytest.mark.parametrize("command", OTHER_TASKS)
def test_what_is_no_pretraining_of_a_gpt_is_refused_by_what_it_is(command, tmp_path):
    more = "--micro-batch-size 1 --global-batch-size 64"
    report = reported(tmp_path, "a.sh", f"torchrun --nproc_per_node 4 {command} {more}")
    assert report.refused
    assert f"this is {'a' if OTHER_TASKS[command] in ('images', 'task') else ''}" in lines(report)
    assert OTHER_TASKS[command] in lines(report)
    assert "\nOK " not in "\n" + lines(report)


def test_a_training_script_that_is_given_nothing_of_megatron_is_not_called_fine(tmp_path):
    report = reported(tmp_path, "a.sh", "torchrun --nproc_per_node 8 train.py --config model.toml")
    assert "`train.py`: is given no option of Megatron" in lines(report)
    assert not any(finding.severity == "OK" for finding in report.findings)


RANKS = {
    "torchrun --nproc_per_node 8 --nnodes 2 S": 16,
    "torchrun --nproc_per_node gpu S": None,
    "#SBATCH --nodes=2 --ntasks-per-node=4\nsrun -l python S": 8,
    "#SBATCH -N 3\n#SBATCH --ntasks-per-node=4\nsrun bash -c 'numactl -m 0 python S'": 12,
    "#SBATCH --nodes=2\nsrun torchrun --nproc_per_node 4 --nnodes $SLURM_NNODES S": 8,
    "#SBATCH --nodes=2\npython S": None,
    "mpirun -np 8 python S": 8,
    "mpirun python S": None,
    "deepspeed --num_gpus 4 --num_nodes 2 S": 8,
    "deepspeed --num_gpus 4 --hostfile hosts S": None,
    "deepspeed S": None,
    "accelerate launch --num_processes 4 S": 4,
    "python -u S": 1,
    "FOO=1 my_launcher python S": None,
}


@pytest.mark.parametrize("text", RANKS)
def test_ranks_follow_from_the_launcher_and_the_scheduler(text, tmp_path):
    path = tmp_path / "a.sh"
    path.write_text(
        "#!/bin/bash\n" + text.replace("S", RUN) if text.endswith(" S") else text.replace(" S'", f" {RUN}'")
    )
    path.write_text("#!/bin/bash\n" + text[:-1].replace(" S", f" {RUN}") + (text[-1] if text[-1] != "S" else RUN))
    assert read(path, Hints()).runs[0].world_size == RANKS[text]


def test_one_micro_batch_a_rank_is_refused_with_sizes_that_do(tmp_path):
    sizes = "--micro-batch-size 4 --global-batch-size 32 --train-iters 100"
    told = lines(reported(tmp_path, "a.sh", f"torchrun --nproc_per_node 8 pretrain_gpt.py {sizes}"))
    assert "b cannot be below B" in told
    assert "a micro-batch size of 1 or 2, or a global batch size of 64" in told
    told = lines(
        reported(tmp_path, "a.sh", f"torchrun --nproc_per_node 8 pretrain_gpt.py {sizes.replace('4', '2', 1)}")
    )
    assert "b cannot be below B" not in told


def test_length_in_tokens(tmp_path):
    command = f"deepspeed --num_gpus 4 {RUN.replace('--train-iters 50', '--train-tokens 1228800')} --deepspeed"
    report = reported(tmp_path, "a.sh", command)
    assert not report.refused
    assert report.proposal.plan is not None
    assert report.proposal.plan.plain_iterations == 150
    told = lines(reported(tmp_path, "a.sh", command + " --train-samples 6400"))
    assert "drop `--train-tokens` and keep `--train-samples`" in told


KUBERNETES = f"""\
apiVersion: v1
kind: Pod
spec:
  containers:
  - name: train
    command: ["/bin/bash", "-c"]
    args:
    - |
      set -e
      # data first
      cd /opt/megatron
      torchrun --nproc_per_node 4 \\
        {RUN}
---
kind: Service
"""
QUOTED = f"job:\n  nodes: 2\n  run: \"cd /opt && torchrun --nproc_per_node 4 {RUN}\"  # here\n  after: 'echo done'\n"
PLAIN = f"steps:\n- script: torchrun --nproc_per_node 4 {RUN}\n- script: echo done"


@pytest.mark.parametrize("text", [KUBERNETES, QUOTED, PLAIN, KUBERNETES.replace("\n", "\r\n")])
def test_scripts_that_stand_in_yaml_are_patched_there(text, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode())
    source = read(path, Hints())
    report = examine("job.yaml", source, WISHES)
    assert not report.refused, lines(report)
    assert report.proposal.plan is not None
    patched = patch(source, report.proposal.config)
    (launch,) = read_launches(tmp_path, patched)
    assert launch.before[-2:] == ("-m", "es_megatron.run")
    assert launch.arguments[:2] == ("--es-selection-keep-ratio", "0.5")
    assert list(yaml.safe_load_all(patched)) != list(yaml.safe_load_all(text))
    assert unpatch("yaml", patched) == (text, True)


def read_launches(folder: Path, text: str) -> tuple:
    (folder / "again.yaml").write_bytes(text.encode())
    return read(folder / "again.yaml", Hints()).launches


def test_a_command_as_a_list_of_words_is_recognised_and_told_what_to_put_in(tmp_path):
    words = ", ".join(f'"{word}"' for word in f"torchrun --nproc_per_node 4 {RUN}".split())
    told = lines(reported(tmp_path, "job.yaml", f"command: [{words}]\n"))
    assert 'put `"-m", "es_megatron.run"` before it' in told


FLOW = {
    "one line": "{micro_batch_size: 2, global_batch_size: 64}",
    "comma": '{\n  "train_micro_batch_size_per_gpu": 4,\n  # why\n  "gradient_accumulation_steps": 8,\n}\n',
    "no comma": '{\n  "micro_batch_size": 4,\n  "global_batch_size": 64\n}  # end\n',
    "comment": "# first\n{micro_batch_size: 4, global_batch_size: 64 # B, or so\n}\r\n",
}


@pytest.mark.parametrize("kind", FLOW)
def test_yaml_in_braces_is_patched_inside_of_them(kind, tmp_path):
    report = reported(tmp_path, "a.yml", FLOW[kind])
    source = read(tmp_path / "a.yml", Hints())
    settings = yaml.safe_load(patch(source, report.proposal.config))
    before = yaml.safe_load(FLOW[kind])
    assert settings.pop("evolved_sampling")["scorer"] == {"kind": "history"}
    assert settings == before


def test_keys_of_other_trainers(tmp_path):
    nemo = "trainer: {devices: 8, num_nodes: 2}\nmodel:\n  micro_batch_size: 1\n  global_batch_size: 128\n"
    nemo += "  tensor_model_parallel_size: 2\n"
    report = reported(tmp_path, "a.yaml", nemo)
    assert report.proposal.plan is not None
    assert "16 ranks = TP 2 x DP 8" in lines(report)
    assert "there is no text to score" in lines(reported(tmp_path, "a.yaml", nemo + "  data: {data_impl: mock}\n"))
    neox = (
        '{"pipe_parallel_size": 2, "train_micro_batch_size_per_gpu": 4, "train_batch_size": 64, "global_num_gpus": 4}'
    )
    assert "4 ranks = PP 2 x DP 2" in lines(reported(tmp_path, "a.yml", neox))
    runs = "runs:\n- {name: a, micro_batch_size: 1, global_batch_size: 8}\n"
    runs += "- {name: b, overlap_moe_expert_parallel_comm: true}\n"
    assert "`overlap_moe_expert_parallel_comm: True`" in lines(reported(tmp_path, "a.yaml", runs))
    recipe = (
        "MODEL_ARGS:\n  --micro-batch-size: 1\n  --tensor-model-parallel-size: 2\n  --inference-max-seq-length: 256\n"
    )
    assert "this is inference" in lines(reported(tmp_path, "a.yaml", recipe))


NO_JSON = {
    '{\n "train_batch_size": BATCH,\n "zero_optimization": {}}': "Line 2: `BATCH` is a placeholder",
    '{\n "train_batch_size": ${BATCH}\n}': "Line 2: `${BATCH}` is a placeholder",
    '{\n "train_batch_size": {{ batch }}\n}': "Line 2: `{{ batch }}` is a placeholder",
    '{\n // why\n "train_batch_size": 8\n}': "Line 2: comments are not JSON",
    '{\n "train_batch_size": 8, # why\n "zero_optimization": {}\n}': "Line 2: comments are not JSON",
    '{\n "train_batch_size": 8,\n\n}': "Line 2: the comma before `}`",
}


@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_no_json_is_told_by_its_line(text, tmp_path):
    with pytest.raises(ConfigError) as told:
        reported(tmp_path, "ds.json", text)
    assert NO_JSON[text] in str(told.value)


def test_automatic_sizes_are_named_by_their_line(tmp_path):
    text = '{\n "train_micro_batch_size_per_gpu": "auto",\n "train_batch_size": "auto",\n'
    text += ' "zero_optimization": {"stage": 1}\n}'
    report = reported(tmp_path, "ds.json", text)
    assert "line 2: `train_micro_batch_size_per_gpu: auto`" in lines(report)
    assert report.proposal.plan is None
    values = {"train_micro_batch_size_per_gpu": "1", "train_batch_size": "64"}
    assert reported(tmp_path, "ds.json", text, Hints(values, world_size=8)).proposal.plan is not None


def test_a_folder_is_checked_in_one_table(tmp_path, capsys):
    for name, text in {
        "good.sh": f"torchrun --nproc_per_node 4 {RUN}",
        "sub/refused.slurm": f"torchrun --nproc_per_node 4 {RUN} --overlap-moe-expert-parallel-comm",
        "sub/odd.sh": f"spawn pretrain_gpt.py {'$OPTIONS'}\n# --micro-batch-size",
        "data.sh": "tar x",
        "readme.yaml": "a: 1",
        ".hidden/good.sh": RUN,
        "note.md": RUN,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cli.main(["patch", "--check", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    rows = [line.split()[:3] for line in told.splitlines()[:-1] if not line.startswith("not understood")]
    assert rows == [["proposed", "script", "good.sh"], ["refused", "script", "sub/refused.slurm"]]
    assert re.search("^not understood +sub/odd.sh", told, re.MULTILINE)
    assert told.splitlines()[-1].startswith("1 proposed, 0 patched, 1 refused, 1 not understood, 2 others")
    for path in ("sub/refused.slurm", "sub/odd.sh"):
        (tmp_path / path).unlink()
    assert cli.main(["patch", str(tmp_path / "good.sh"), "--in-place"]) == 0
    capsys.readouterr()
    assert cli.main(["patch", "--check", str(tmp_path)]) == 0
    assert "patched         script    good.sh" in capsys.readouterr().out
    assert cli.main(["patch", str(tmp_path)]) == 2
    assert cli.main(["patch", "--check", str(tmp_path / "sub")]) == 2


def test_a_file_takes_hundredths_of_a_second(tmp_path):
    options = " \\\n  ".join(f"--option-{number} $VALUE_{number}" for number in range(100))
    text = "".join(f"VALUE_{number}=${{A{number}:-{number}}}\n" for number in range(100))
    (tmp_path / "a.sh").write_text(
        f'{text}CMD="torchrun --nproc_per_node 4 {RUN} \\\n  {options}"\nsrun bash -c "$CMD"\n'
    )
    check_folder(tmp_path, Hints(), WISHES)
    start = time.process_time()
    check_folder(tmp_path, Hints(), WISHES)
    assert time.process_time() - start < 0.5  # a fortieth of it where nothing else runs


def test_an_output_that_was_edited_is_not_written_over(tmp_path, capsys):
    config, copy = tmp_path / "train.sh", tmp_path / "train.es.sh"
    config.write_text(f"#!/bin/bash\ntorchrun --nproc_per_node 4 {RUN}\n")
    assert cli.main(["patch", str(config)]) == 0
    assert cli.main(["patch", str(config)]) == 0
    assert f"already patched: {copy}" in capsys.readouterr().out
    assert cli.main(["patch", str(config), "--es-pruning-ratio", "0.2"]) == 0  # other settings, and nothing edited
    for edit in (("ratio 0.2", "ratio 0.2  # less"), ("#!/bin/bash", "#!/bin/bash\nset -e")):
        edited = copy.read_text().replace(*edit)
        copy.write_text(edited)
        assert cli.main(["patch", str(config)]) == 2
        assert "`--force`" in capsys.readouterr().err
        assert copy.read_text() == edited
        assert cli.main(["patch", str(config), "--force", "--es-pruning-ratio", "0.2"]) == 0
        assert copy.read_text() != edited
    other = tmp_path / "notes.sh"
    other.write_text("echo mine\n")
    assert cli.main(["patch", str(config), "--output", str(other)]) == 2
    assert other.read_text() == "echo mine\n"


def test_what_was_not_followed_is_told(tmp_path):
    told = lines(reported(tmp_path, "a.sh", f"source env.sh\ntorchrun --nproc_per_node 4 {RUN} --bf16=true $MORE\n"))
    assert "`source env.sh` is not followed" in told
    assert "`$MORE`: not set in this file, and may hold more options" in told


@pytest.mark.skipif(not CASES.is_dir(), reason=f"needs the reduced inputs: ES_CONFIG_CASES=FOLDER (not at {CASES})")
def test_reduced_inputs_are_taken_or_refused_as_their_index_says():
    taken = {"r01", "r02", "r04", "r12", "r14", "r16"}
    for path in sorted(each for each in CASES.iterdir() if each.name.startswith("r")):
        try:
            source = read(path, Hints())
            report = examine(path.name, source, WISHES)
            accepted = not report.refused
            if accepted:
                assert unpatch(source.kind, patch(source, report.proposal.config)) == (source.text, True)
        except ConfigError:
            accepted = False
        assert accepted == (path.name[:3] in taken), path.name


def test_bash_takes_every_patched_copy(tmp_path):
    text = f"case $1 in\n  a) torchrun --nproc_per_node 4 {RUN} ;;\nesac\n"
    (tmp_path / "a.sh").write_text(text)
    source = read(tmp_path / "a.sh", Hints())
    patched = patch(source, EvolvedSamplingConfig())
    assert subprocess.run(["bash", "-n"], input=patched, text=True, check=False, timeout=20).returncode == 0
