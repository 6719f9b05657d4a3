"""What claims of speed are measured with: ratios inside one process."""
