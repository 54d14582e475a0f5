"""The paper's AdamW with its number formats, weight averages and the loss scale."""
