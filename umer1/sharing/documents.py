"""What stands beside the weights of every export: the card, the chat form, the files of sentence-transformers."""

from umer1.data.images import ImageConfig
from umer1.data.input_settings import InputSettings
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.sharing.card import Subject, model_card
from umer1.sharing.chat_template import missing_template
from umer1.sharing.module_files import module_files


def export_documents(subject: Subject, directory: HFDirectory) -> dict[str, str]:
    """Relative path -> text, for `save_hf`.  directory: where the exported configuration and settings are from."""
    pictures = ImageConfig.of_directory(directory)
    modules = module_files(directory.config.hidden_size, pictures)
    kept = InputSettings.read(directory)
    card = model_card(subject, blank_image_for_text=kept is not None and kept.blank_image_for_text)
    return modules | missing_template(directory) | {"README.md": card}
