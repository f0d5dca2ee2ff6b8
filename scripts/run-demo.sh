#!/bin/sh
# Sets up and answers a question about a long real document with 60 % of the KV cache. The document is Python's own reference
# on its special methods, which every installation carries.
set -eu
cd "$(dirname "$0")/.."
scripts/setup.sh
document=build/demo.txt
.venv/bin/python -c "# about 7,000 tokens
from pydoc_data.topics import topics
print(topics['specialnames'][:29500].rsplit('\n\n', 1)[0])" > "$document"
echo "The document: $(wc -w < "$document") words of the Python reference, $document"
exec .venv/bin/depthkv-edge run smollm2 --kv-budget 0.6 -c 8192 -f "$document" \
    -p "${1:-In one or two sentences: what are these methods for?}" -n 64
