"""The self-contained HTML report, with one module for each of its sections; and pictures for people."""
