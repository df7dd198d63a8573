"""The runtime: memory, op table, threads, states, sampling, streaming, tokenizers."""
