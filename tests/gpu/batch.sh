#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What docs/benchmarks.md records, in one go on a GPU machine: `bash tests/gpu/batch.sh STAGE ...`. Output and rows go to
# $OUT (default: /tmp/out); a stage that fails or runs longer than $LIM seconds (default 300) does not keep the next.
#
#   kernels    tests/gpu/test_decode_kernels.py; parts of a layer (bench.kernels)                               needs no vLLM
#   sanitize   compute-sanitizer over the kernels' twin tests                                                  needs no vLLM
#   timeline   the picture of one layer                                                                        needs no vLLM
#   ours full fp8        rows "step 1K, 128K", TTFT, GPU bytes of ours, FLASH_ATTN, FLASH_ATTN with fp8 KV
#   rivals     page "When not to use it"
#   fill       rows "step 512K"; batch     row "tokens/s, batch 6" (needs 128 GiB of memory)
#   search     a layer's search by CPU workers, by AVX-512 VNNI and by Faiss (bench.search)
#   faiss      row "sketch_gb: 0";  quality-faiss     planted numbers with it
#   two        tests/gpu/test_tensor_parallel.py, row "step 128K" and planted numbers on two GPUs
#   reuse      rows "second question", "eight at once", "half the batch on shared pages"
#   sweep      row "Llama-3.2-1B shape to 1M tokens"
#   quality    rows "KL" and "planted numbers", alone and in a batch of 8; $MODEL: a 64K model's folder
#   asking     tests/gpu/test_asking.py                                                                      needs no vLLM
#   triton     tests/gpu/test_kernels.py;  features     tests/gpu/test_lora_engine.py, test_graph_features.py
#   watch      row "a watched server"
#   engine     tests/gpu/test_quantized_weights.py, test_without_workers.py, test_sketch_engine.py, test_reuse_engine.py (reuse-test: the last alone)
#   http       tests/gpu/test_tpot_over_http.py
#
# Without an installed package, PYTHONPATH must name this repository and vLLM.
set -u
: "${OUT:=/tmp/out}" "${LIM:=300}" "${MODEL:=/tmp/model}"
mkdir -p "$OUT"
run() {  # a stage's command: the log keeps all of it, the terminal what matters
  echo "== $*" | cut -c1-300 | tee -a "$OUT/log"
  local begin=$SECONDS
  timeout -k 10 "$LIM" "$@" >"$OUT/last" 2>&1
  local code=$?
  cat "$OUT/last" >>"$OUT/log"
  grep -E '^\{|passed|failed|Error|^E  |╭|│|KL|ERROR SUMMARY|RACECHECK|retrieval: (host|GPU|both)' "$OUT/last" | grep -v '^frame' | cut -c1-900 | tail -40
  echo "-- exit $code after $((SECONDS - begin)) s" | tee -a "$OUT/log"
}
cli() { run python3 -c 'from vllm_retrieval_attn.cli import app; app()' "$@"; }
graphs() { echo "\"gpu_memory_utilization\":0.9,\"compilation_config\":{\"cudagraph_capture_sizes\":[$1]}"; }
decode() { cli bench decode "$@"; }
evaluate() {  # tasks, max_num_seqs, more knobs
  cli eval --model "$MODEL" --modes full,attention --lengths 64000 --score-tokens 96 --tasks "$1" --json "$OUT/eval-$2${3:+-more}.json" --options \
    "{\"gpu_memory_utilization\":0.6,\"max_num_seqs\":$2,\"max_num_batched_tokens\":8192,\"dtype\":\"float16\",\"max_model_len\":65536,${RANKS:+\"tensor_parallel_size\":$RANKS,}
      \"compilation_config\":{\"mode\":0,\"cudagraph_mode\":\"FULL_DECODE_ONLY\",\"cudagraph_capture_sizes\":[1,2,4,8]},\"retrieval\":{\"host_memory_gb\":24${3:-}}}"
}
for stage in "$@"; do
  case $stage in
  kernels)
    run python3 -m pytest -p no:cacheprovider tests/gpu/test_decode_kernels.py
    for more in "" "--rows 1024" "--rows-batch 6" "--tokens 524288"; do
      # shellcheck disable=SC2086
      run python3 -m vllm_retrieval_attn.bench.kernels --products --host-gb 20 --memory managed $more
    done ;;
  sanitize)
    for tool in memcheck racecheck synccheck; do
      run compute-sanitizer --report-api-errors no --tool $tool python3 -m pytest -p no:cacheprovider \
        tests/gpu/test_decode_kernels.py -k "64 and bfloat16 or long_row"
    done ;;
  timeline) cli bench timeline --plot "$OUT/timeline.png" --json "$OUT/timeline.json" ;;
  ours) decode --ways sketch --contexts 1024 --batches 1,32 --tokens 60 --options "{$(graphs 1,2,4,8,32),\"retrieval\":{\"host_memory_gb\":8}}"
    decode --ways sketch --contexts 1024,131072 --rows 512,1024 --tokens 60 --options "{$(graphs 1,2),\"retrieval\":{\"host_memory_gb\":24}}" ;;
  full)
    decode --ways full --contexts 1024 --batches 1,32 --tokens 60 --options "{$(graphs 1,2,4,8,32)}"
    decode --ways full --contexts 131072 --batches 1,2,3 --tokens 60 --options "{$(graphs 1,2,3)}" ;;
  fp8) decode --ways full-fp8 --contexts 131072 --batches 1,3,6 --tokens 60 --options "{$(graphs 1,2,3,6)}" ;;
  rivals)  # each as it is best: the largest of these batches that there is memory for
    for way in full full-fp8 full-offload; do
      decode --ways $way --contexts 8192,32768 --batches 1,4,16 --tokens 40 --options "{$(graphs 1,2,4,8,16)}"
    done
    decode --ways full-offload --contexts 131072 --batches 1,3,6 --tokens 40 --options "{$(graphs 1,2,3,6)}"
    decode --ways sketch --fill --contexts 8192,32768 --batches 1,4,16 --tokens 40 --options "{$(graphs 1,2,4,8,16),\"retrieval\":{\"host_memory_gb\":90}}" ;;
  fill) decode --ways sketch --fill --contexts 131072,524288 --tokens 60 --options "{$(graphs 1,2),\"retrieval\":{\"host_memory_gb\":84}}" ;;
  batch) decode --ways sketch --fill --contexts 131072 --batches "${BATCHES:-1,3,6}" --tokens "${TOKENS:-60}" --options "{$(graphs 1,2,3,4,6),\"retrieval\":{\"host_memory_gb\":${HOST:-121}}}" ;;
  two)  # on two GPUs; the eval's model has heads for two ranks
    export VLLM_ALLREDUCE_USE_SYMM_MEM=0
    for way in sketch full; do
      decode --ways $way --contexts 131072 --tokens 60 --options "{$(graphs 1,2),\"tensor_parallel_size\":2$([ $way = full ] || echo ',"retrieval":{"host_memory_gb":24}')}"
    done
    [ -e "$MODEL-even" ] || python3 tests/gpu/even_heads.py "$MODEL" "$MODEL-even"
    RANKS=2 MODEL=$MODEL-even evaluate crowd:16 2
    [ -n "${SHORT:-}" ] || run python3 -m pytest -p no:cacheprovider tests/gpu/test_tensor_parallel.py ;;
  search)
    for scan in auto faiss; do run python3 -m vllm_retrieval_attn.bench.search --scan $scan --rows 512,1024; done
    run python3 -m vllm_retrieval_attn.bench.search --threads 8 --rows 512 ;;
  faiss) # the first prompt is what the model's space is learned from
    decode --ways faiss --contexts 32768,131072 --tokens 60 --options "{$(graphs 1,2),\"retrieval\":{\"host_memory_gb\":24}}" ;;
  reuse) cli bench reuse --json "$OUT/reuse.json" --options "{$(graphs 1,2,4,8),\"retrieval\":{\"host_memory_gb\":60}}" ;;
  sweep) cli bench sweep --plot "$OUT/sweep.png" --json "$OUT/sweep.json" --options "{$(graphs 1,2),\"retrieval\":{\"host_memory_gb\":45}}" ;;
  quality) evaluate "${TASKS:-prose:4,crowd:16}" 1; [ -n "${TASKS:-}" ] || evaluate crowd:16 8 ;;
  quality-faiss) evaluate "${TASKS:-crowd:16}" 2 ',"sketch_gb":0' ;;
  watch) cli bench watch --tokenizer "$MODEL" --json "$OUT/watch.json" --serve "--gpu-memory-utilization 0.45" ;;
  asking) run python3 -m pytest -p no:cacheprovider tests/gpu/test_asking.py ;;
  triton) run python3 -m pytest -p no:cacheprovider tests/gpu/test_kernels.py ;;
  features) run python3 -m pytest -p no:cacheprovider tests/gpu/test_lora_engine.py tests/gpu/test_graph_features.py ;;
  reuse-test) run python3 -m pytest -p no:cacheprovider tests/gpu/test_reuse_engine.py ;;
  engine) run python3 -m pytest -p no:cacheprovider tests/gpu/test_quantized_weights.py
    run python3 -m pytest -p no:cacheprovider tests/gpu/test_without_workers.py
    run python3 -m pytest -p no:cacheprovider tests/gpu/test_sketch_engine.py tests/gpu/test_reuse_engine.py ;;
  http) RETRIEVAL_TEST_TOKENIZER=$MODEL run python3 -m pytest -s -p no:cacheprovider tests/gpu/test_tpot_over_http.py ;;
  *) echo "unknown stage $stage"; exit 2 ;;
  esac
done
rm -f "$OUT/last"
