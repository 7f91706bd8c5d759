"""Files, processes and versions. Imports nothing of ours."""
