"""Training engines, which hold a model while it trains: their protocol, replicas (torch DDP), and DeepSpeed ZeRO."""
