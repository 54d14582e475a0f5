"""Which pairs are kept: rules about captions and pictures, each with a reason, and near-duplicates."""
