"""From predictions to figures: uncertainties, metrics, calibration and pictures."""
