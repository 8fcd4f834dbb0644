"""What fine-tuning changed: validation loss, answers before and after, and how right they are.

`python -m llm_peft_fa.evaluate --run runs/NAME` repeats the evaluation of a run, on its data or on other.
"""

from labs_common.cli import run_command
from llm_peft_fa.config import EvaluateConfig


def main() -> None:
    """The command."""
    run_command(evaluate, EvaluateConfig, "python -m llm_peft_fa.evaluate")


def evaluate(config: EvaluateConfig) -> None:
    """Loads a run's base and adapter, answers prompts with both, and writes evaluation.json and .html."""
    from accelerate import Accelerator

    from labs_common.cli import config_from_yaml, to_plain
    from labs_common.errors import LabError
    from labs_common.progress import console
    from labs_common.report import Section, Table, write_report
    from labs_common.run import Run
    from llm_peft_fa.adapters import adapted_model, latest_run
    from llm_peft_fa.answers import collected_prompts, compared
    from llm_peft_fa.config import TrainConfig
    from llm_peft_fa.data import read_conversations, training_and_validation
    from llm_peft_fa.model import load_tokenizer
    from llm_peft_fa.results import answers_section, numbers_section

    folder = latest_run(config.run)
    trained = config_from_yaml(TrainConfig, folder / "config.yaml")
    output = config.output or folder
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--output {output}: cannot be written ({error.strerror})") from error
    if config.reading.data is None:
        _, reading = training_and_validation(trained.data, trained.run.seed)
    else:
        reading = read_conversations(config.reading.data, config.reading.split, config.reading)
    accelerator = Accelerator()
    tokenizer = load_tokenizer(str(folder / "adapter"))
    model = adapted_model(folder / "adapter", trained.model.model).to(accelerator.device)
    prompts = collected_prompts(reading, config.generation, trained.run.seed)
    comparison = compared(model, tokenizer, prompts, config.generation, accelerator)
    run = Run(output, accelerator.is_main_process)
    run.save_json("evaluation.json", {"config": to_plain(config), "scores": comparison.scores})
    sections = [
        Section("Data", [Table(("source", "conversations"), [(reading.source, len(reading.conversations))])]),
        numbers_section(comparison.scores),
        answers_section(comparison),
    ]
    path = write_report(
        run, f"Evaluation of {folder.name}", f"Base: {trained.model.model}", sections, "evaluation.html"
    )
    if accelerator.is_main_process:
        for name, values in comparison.scores.items():
            console.print(f"{name}: " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
        print(f"report: {path}")


if __name__ == "__main__":
    main()
