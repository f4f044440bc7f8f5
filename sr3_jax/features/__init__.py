"""Networks that metrics need (LPIPS, Inception, AlexNet), statistics of their features, and classifiers."""
