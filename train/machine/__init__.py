"""What a machine can do: measured rates, fast dtypes, recorded times of attention. Needs no library but torch."""
