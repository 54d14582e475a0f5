"""What every rank has: its device, the signal vector and the watchdog."""
