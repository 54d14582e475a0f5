"""The self-contained HTML report: one module for each section."""
