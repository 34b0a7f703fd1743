"""What the paper compares LAPA with, beyond what the three stages do themselves."""
