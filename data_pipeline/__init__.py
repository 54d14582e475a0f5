"""From image files and captions to batches of tensors: sources, filters, shard sets, the tokenizer and loaders."""
