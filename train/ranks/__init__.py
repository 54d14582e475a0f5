"""What every rank has: its device, the signal vector, the watchdog."""
