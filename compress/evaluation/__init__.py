"""What a compression cost: fidelity, tasks, memory and speed."""
