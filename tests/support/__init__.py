"""What tests share: servers, stand-ins, made sets, processes."""
