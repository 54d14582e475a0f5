"""What holds a model while it trains: the protocol, replicas, and DeepSpeed ZeRO."""
