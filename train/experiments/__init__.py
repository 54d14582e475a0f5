"""Studies of the paper's claims and of peers: ``python -m train.experiments``. Nothing imports them."""
