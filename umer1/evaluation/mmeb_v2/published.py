"""What the paper reports for MMEB-V2, in per cent: rows of its main table, and UME-R1-2B task by task."""

# Column -> the groups whose tasks it averages, in the order of the paper's table.
COLUMNS: dict[str, tuple[str, ...]] = {
    "I-CLS": ("I-CLS",),
    "I-QA": ("I-QA",),
    "I-RET": ("I-RET",),
    "I-GD": ("I-GD",),
    "Image": ("I-CLS", "I-QA", "I-RET", "I-GD"),
    "V-CLS": ("V-CLS",),
    "V-QA": ("V-QA",),
    "V-RET": ("V-RET",),
    "V-MRET": ("V-MRET",),
    "Video": ("V-CLS", "V-QA", "V-RET", "V-MRET"),
    "VDR1": ("VDR1",),
    "VDR2": ("VDR2",),
    "VisRAG": ("VisRAG",),
    "OOD": ("OOD",),
    "VisDoc": ("VDR1", "VDR2", "VisRAG", "OOD"),
    "All": ("I-CLS", "I-QA", "I-RET", "I-GD", "V-CLS", "V-QA", "V-RET", "V-MRET", "VDR1", "VDR2", "VisRAG", "OOD"),
}


def _row(scores: str) -> dict[str, float]:
    """In the order of COLUMNS; "-" where the paper has no number."""
    return {column: float(score) for column, score in zip(COLUMNS, scores.split(), strict=True) if score != "-"}


# Gen mode on both sides for UME-R1, disc for DUME, per query the better of both for the oracle.
PUBLISHED: dict[str, dict[str, float]] = {
    "UME-R1-2B": _row("64.8 62.8 67.6 77.2 66.6 44.3 51.2 32.9 39.7 42.2 72.4 46.2 79.2 37.2 63.9 60.1"),
    "UME-R1-7B": _row("67.1 69.2 71.9 84.9 71.3 48.6 60.7 38.2 39.3 47.5 75.7 50.5 83.7 37.6 67.1 64.5"),
    "DUME-2B": _row("- - - - 62.5 - - - - 33.2 - - - - 52.8 52.7"),
    "VLM2Vec-V2-2B": _row("- - - - 64.9 - - - - 34.9 - - - - 65.4 58.0"),
    "Oracle-2B": _row("67.6 67.5 71.2 80.1 70.2 47.0 58.7 37.2 48.8 47.9 76.8 51.5 82.6 41.5 68.2 64.4"),
    "Oracle-7B": _row("69.1 73.2 74.8 87.4 74.2 51.6 67.2 39.6 49.6 52.2 79.7 55.8 86.0 40.7 70.8 68.1"),
}

# UME-R1-2B in gen mode.
PER_TASK: dict[str, float] = {
    # image classification
    "ImageNet-1K": 75.3,
    "N24News": 81.1,
    "HatefulMemes": 75.2,
    "VOC2007": 80.0,
    "SUN397": 79.4,
    "Place365": 42.6,
    "ImageNet-A": 50.4,
    "ImageNet-R": 88.7,
    "ObjectNet": 52.0,
    "Country211": 23.4,
    # image QA
    "OK-VQA": 62.4,
    "A-OKVQA": 51.1,
    "DocVQA": 92.2,
    "InfographicsVQA": 67.7,
    "ChartQA": 64.9,
    "Visual7W": 54.1,
    "ScienceQA": 42.7,
    "VizWiz": 46.8,
    "GQA": 67.3,
    "TextVQA": 78.6,
    # image retrieval
    "VisDial": 76.6,
    "CIRR": 53.7,
    "VisualNews_t2i": 71.7,
    "VisualNews_i2t": 74.2,
    "MSCOCO_t2i": 75.1,
    "MSCOCO_i2t": 68.9,
    "NIGHTS": 67.2,
    "WebQA": 90.0,
    "FashionIQ": 17.1,
    "Wiki-SS-NQ": 62.0,
    "OVEN": 66.9,
    "EDIS": 88.0,
    # image grounding
    "MSCOCO": 69.5,
    "RefCOCO": 83.3,
    "RefCOCO-Matching": 84.4,
    "Visual7W-Pointing": 71.5,
    # video
    "K700": 35.8,
    "SmthSmthV2": 44.1,
    "HMDB51": 54.4,
    "UCF101": 67.2,
    "Breakfast": 20.1,
    "MVBench": 49.9,
    "Video-MME": 41.7,
    "NExTQA": 59.9,
    "EgoSchema": 45.4,
    "ActivityNetQA": 57.8,
    "DiDeMo": 32.4,
    "MSR-VTT": 34.3,
    "MSVD": 55.4,
    "VATEX": 29.9,
    "YouCook2": 12.7,
    "QVHighlight": 57.5,
    "Charades-STA": 20.4,
    "MomentSeeker": 41.2,
    # visual documents
    "ViDoRe_arxivqa": 73.9,
    "ViDoRe_docvqa": 37.9,
    "ViDoRe_infovqa": 76.2,
    "ViDoRe_tabfquad": 86.1,
    "ViDoRe_tatdqa": 40.6,
    "ViDoRe_shiftproject": 66.8,
    "ViDoRe_syntheticDocQA_artificial_intelligence": 85.9,
    "ViDoRe_syntheticDocQA_energy": 83.3,
    "ViDoRe_syntheticDocQA_government_reports": 82.6,
    "ViDoRe_syntheticDocQA_healthcare_industry": 90.8,
    "ViDoRe_esg_reports_human_labeled_v2": 50.2,
    "ViDoRe_biomedical_lectures_v2_multilingual": 46.2,
    "ViDoRe_economics_reports_v2_multilingual": 45.7,
    "ViDoRe_esg_reports_v2_multilingual": 42.7,
    "VisRAG_ArxivQA": 74.3,
    "VisRAG_ChartQA": 86.0,
    "VisRAG_MP-DocVQA": 75.6,
    "VisRAG_SlideVQA": 87.1,
    "VisRAG_InfoVQA": 84.4,
    "VisRAG_PlotQA": 68.0,
    "ViDoSeek-page": 21.2,
    "ViDoSeek-doc": 75.9,
    "MMLongBench-page": 11.9,
    "MMLongBench-doc": 39.7,
}
