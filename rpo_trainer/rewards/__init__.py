"""From responses to reward gaps: sampled, scored, judged, made into preference rows, calibrated."""
