"""The papers' formulas as pure functions on tensors; torch is the only import."""
