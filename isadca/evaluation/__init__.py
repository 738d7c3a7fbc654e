"""The paper's Table 1: the systems it compares, the metrics it measures by. The core imports nothing from here."""
