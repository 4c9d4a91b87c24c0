"""What is done to whole models: finding, replacing and fusing layers, and the summary."""
