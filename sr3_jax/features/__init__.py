"""Networks that metrics need (LPIPS, Inception, AlexNet), statistics of their features, classifiers, and the suite of
metrics that an evaluation computes with them (`metric_suite`)."""
