"""What a machine can do: rates, dtypes, recorded attention times. Needs no more than torch."""
