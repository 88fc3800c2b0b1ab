"""The numbers: what share of 16-bit weights an update of a given size cannot move."""
