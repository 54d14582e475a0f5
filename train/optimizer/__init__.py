"""The paper's AdamW with its 16-bit number formats, weight averages, and the loss scale."""
