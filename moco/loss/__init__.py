"""The formulas of the papers: functions and dataclasses on tensors that import only torch."""
