"""From text to training batches: readers, de-duplication, tokenizer, token shards, sampler."""
