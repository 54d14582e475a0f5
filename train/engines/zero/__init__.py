"""DeepSpeed ZeRO behind one engine; the only importer of deepspeed."""
