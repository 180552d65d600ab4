"""The process beside the training process: it samples, records and judges. Standard library and memtrack only."""
