"""Launch scripts of many shapes, made of a few building blocks each: how the command is put together, and its parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

SCRIPT = "pretrain_gpt.py"
SIZES = "--num-layers 4 --hidden-size 64 --micro-batch-size 1 --global-batch-size 64 --train-iters 100"

LAUNCHERS = {
    "torchrun": "torchrun --nproc_per_node 4",
    "module": "python -u -m torch.distributed.run --nproc_per_node=4",
    "python": "python3 -u",
    "deepspeed": "deepspeed --num_gpus 4",
    "srun": "srun --ntasks=4 python3",
    "mpirun": "mpirun -np 4 -x A=b python3",
    "env": "env NCCL_DEBUG=WARN torchrun --nproc_per_node 4",
    "numactl": "numactl --membind=0 torchrun --nproc_per_node 4",
    "nsys": "nsys profile -o trace python3",
    "timeout": "timeout 60 torchrun --nproc_per_node 4",
}

# L: launcher, S: script, A: arguments in the text, as words that need no quotes.
FORMS = {
    "direct": "L S A\n",
    "continued": "L \\\n  S \\\n  A 2>&1 | tee log\n",
    "assignment_before": "OMP_NUM_THREADS=1 L S A\n",
    "script_variable": "SRC=S\nL $SRC A\n",
    "script_variable_quoted": 'DIR=$PWD\nSRC="${DIR}/S"\nL "$SRC" A\n',
    "launcher_variable": 'LAUNCHER="L"\n$LAUNCHER S A\n',
    "arguments_variable": 'ARGS="\n  A\n"\nL S $ARGS\n',
    "arguments_array": 'ARGS=(\n  A  # all of them\n)\nL S "${ARGS[@]}"\n',
    "arguments_appended": 'ARGS="A"\nARGS+=" --bf16"\nL S ${ARGS}\n',
    "arguments_in_two": 'ONE=(A)\nTWO=(--bf16 --seed 1)\nL S "${ONE[@]}" ${TWO[@]} $EXTRA\n',
    "scalar": 'CMD="L S A"\necho "$CMD"\n$CMD\n',
    "scalar_many_lines": 'export CMD=" \\\n    L \\\n    S \\\n    A \\\n    "\n$CMD\n',
    "scalar_in_steps": 'SRC="./S"\nCMD="L"\nCMD="${CMD} ${SRC}"\n'
    'CMD="${CMD} A"\nif [ "$BF" = 1 ]; then CMD="$CMD --bf16"; fi\n${CMD}\n',
    "scalar_appended": "CMD='L'\nCMD+=' S'\nCMD+=\" A\"\n$CMD\n",
    "scalar_of_variables": 'A="A"\nT="S"\nCMD="L $T $A"\n${CMD} > log\n',
    "array": 'CMD=(L S A)\n"${CMD[@]}"\n',
    "array_appended": 'CMD=(L)\nCMD+=(S)\nCMD+=(A)\n"${CMD[@]}"\n',
    "array_in_parts": 'RUN=(L)\nREST=(S A)\n"${RUN[@]}" "${REST[@]}" --seed 2\n',
    "array_prefixed": 'CMD=(L S A)\nif [ -n "$NSYS" ]; then CMD=(nsys profile "${CMD[@]}"); fi\n"${CMD[@]}"\n',
    "eval": 'CMD="L S A"\neval $CMD\n',
    "eval_quoted": 'run_cmd="L ./S A &> log"\necho ${run_cmd}\neval "${run_cmd}"\nset +x\n',
    "eval_array": 'CMD=(L S A)\neval "${CMD[*]}"\n',
    "exec": "exec L S A\n",
    "bash_c": 'bash -c "L S A"\n',
    "bash_c_variable": 'CMD="L S A"\nbash -c "$CMD"\n',
    "bash_ec_cd": "bash -ec 'cd . && L S A'\n",
    "bash_c_exported": "export CMD=\"L S A\"\nbash -c '$CMD'\n",
    "bash_c_parts": 'export LAUNCHER="L"\nexport CMD="`pwd`/S A"\n'
    "srun --jobid 1 bash -c '$LAUNCHER $CMD' 2>&1 | tee log\n",
    "bash_c_double": 'CMD="L S A"\nsrun -lu bash -c "RANK=\\$SLURM_PROCID ${CMD}"\n',
    "bash_c_many_lines": 'srun bash -c "\n  set -e\n  L S \\\n    A\n"\n',
    "bash_c_quotes_inside": "bash -c \"L 'S' A --data-path 'a b'\"\n",
    "bash_c_star": 'CMD=(L S A)\nbash -c "${CMD[*]}"\n',
    "bash_c_twice": "export CMD='L S A'\nsrun bash -c 'bash -c \"$CMD\"'\n",
    "bash_c_positional": "bash -c 'L \"$@\"' _ S A\n",
    "function": "run() {\n  L S A\n}\nrun\n",
    "function_arguments": 'launch() {\n  L "$@"\n}\nlaunch S A\n',
    "function_script": 'function launch {\n  local file=$1; shift\n  L "$file" "$@"\n}\nlaunch S A\n',
    "function_exported": "run() { L S A; }\nexport -f run\nsrun bash -c run\n",
    "here_document": "bash <<EOF\nL S A\nEOF\n",
    "here_document_quoted": "ARGS='A'; export ARGS\nbash <<'EOF'\n  L S $ARGS\nEOF\n",
    "here_document_tabs": "if true; then\n\tbash <<-EOF\n\t\tL S A\n\tEOF\nfi\n",
    "here_document_sbatch": 'CMD="L S A"\nsbatch <<EOF\n#!/bin/bash\nsrun bash -c "${CMD}" 2>&1\nEOF\n',
    "here_document_file": "cat > job.sh <<EOF\n#!/bin/bash\nL S A\nEOF\nbash job.sh\n",
    "here_document_value": "CMD=$(cat <<EOF\nL S A\nEOF\n)\n$CMD\n",
    "read_value": "read -r -d '' CMD <<EOF\nL S A\nEOF\n$CMD\n",
    "here_string": 'bash <<< "L S A"\n',
    "prefix_if": 'CMD="L S A"\nif [ "$NSYS" = true ]; then CMD="nsys profile $CMD"; fi\n$CMD\n',
    "branches": 'if [ "$NSYS" = true ]; then\n  nsys profile L S A\nelse\n  L S A\nfi\n',
    "branches_of_launchers": 'if [ "$NSYS" = true ]; then R="L"; else R="L --seed"; fi\n$R S A\n',
    "branches_of_commands": 'if [ -z "$NSYS" ]; then\n  CMD="L S A"\nelse\n  CMD="L S A --bf16"\nfi\neval "$CMD"\n',
    "case": "case ${SIZE:-small} in\n  small) L S A ;;\n  *) echo no ;;\nesac\n",
    "case_unknown": 'case "$NSYS" in\n  true)\n    L S A --bf16 ;;\n  *)\n    L S A\n    ;;\nesac\n',
    "for": "for i in 1 2\ndo L S A --seed $i\ndone\n",
    "while": "n=0\nwhile [ $n -lt 2 ]; do\n  n=$((n + 1))\n  L S A\ndone\n",
    "chain": "mkdir -p out && cd . && L S A || exit 1\n",
    "test_and": '[ "$NSYS" = true ] && L S A --bf16\n[ "$NSYS" = true ] || L S A\n',
    "subshell": "(\n  cd .\n  L S A\n) &\nwait\n",
    "group": "{ L S A; } 2>&1 | tee log\n",
    "background": "nohup L S A > log 2>&1 &\nwait\n",
    "container": "singularity exec --nv image.sif bash -c 'L S A'\n",
    "container_words": "singularity exec --nv image.sif L S A\n",
    "posix": "#!/bin/sh\nset -e\nARGS='A'\nL S $ARGS\n",
    "slice": 'ALL=(x L S A)\n"${ALL[@]:1}"\n',
    "default": "L ${FILE:-S} A\n",
    "set_dashes": 'set -- A\nL S "$@"\n',
    "echoed_into_bash": 'echo "L S A" | bash\n',
    "taken_names": 'ES_ARGS=(A)\nL S "${ES_ARGS[@]}"\n',
}

ARGUMENTS = {
    "plain": SIZES,
    "equals": SIZES.replace(" 4 ", " 4 --lr=1e-4 "),
    "odd": SIZES + " --split 949,50,1 --tokenizer-model a/b.model",
}


class Shape(NamedTuple):
    """A script, and what it is made of."""

    name: str
    text: str


def shapes() -> Iterator[Shape]:
    """All shapes: every form with every launcher and every kind of arguments."""
    for (form, text), (launcher, words), (kind, arguments) in itertools.product(
        FORMS.items(), LAUNCHERS.items(), ARGUMENTS.items()
    ):
        parts = {"L": words, "S": SCRIPT, "A": arguments}
        head = "" if text.startswith("#!") else "#!/bin/bash\n"
        yield Shape(f"{form}-{launcher}-{kind}", head + substitute(text, parts))


def substitute(text: str, parts: dict[str, str]) -> str:
    """The letters L, S and A, where they stand as words or behind a slash, replaced."""
    found, at = list[str](), 0
    while at < len(text):
        alone = (
            text[at] in parts
            and (at == 0 or not (text[at - 1].isalnum() or text[at - 1] in "_$"))
            and (at + 1 == len(text) or not (text[at + 1].isalnum() or text[at + 1] in "_="))
            and text[at - 2 : at] not in ("-x",)
        )
        found.append(parts[text[at]] if alone else text[at])
        at += 1
    return "".join(found)
