"""The table of loops in docs/loops.md as data: rows of test_loops.py, and rows whose tests are elsewhere.

`scripts/loops.py` writes the page from it; a test holds that every test named here exists.
"""

from __future__ import annotations

from tests.online.loop_rows import REFUSED, SAID, SUPPORTED, Row
from tests.online.loops_by_hand import BY_HAND
from tests.online.loops_detached import DETACHED
from tests.online.loops_fields import FIELDS
from tests.online.loops_listed import FURTHER, Listed
from tests.online.loops_losses import LOSSES
from tests.online.loops_modules import MODULES
from tests.online.loops_optimizers import OPTIMIZERS
from tests.online.loops_precision import PRECISIONS
from tests.online.loops_steps import STEPS

SECTIONS: dict[str, dict[str, Row]] = {
    "Around the step": STEPS,
    "Precision": PRECISIONS,
    "Optimizers and models": OPTIMIZERS,
    "Modules": MODULES,
    "Losses": LOSSES,
    "Fields": FIELDS,
    "Weights and gradients written by hand": BY_HAND,
    "What is in no graph": DETACHED,
}
LOOPS: dict[str, Row] = {name: row for rows in SECTIONS.values() for name, row in rows.items()}


FD = "online/test_tuner.py::test_hypergradient_of_a_live_loop_is_that_of_finite_differences"
SEVERAL = "online/test_tuner_several_optimizers.py::"
LAYERS = "core/test_layers.py::test_layer"
ARGUMENTS, PHASES = "online/test_tuner_arguments.py::", "online/test_tuner_phases.py::"
SCHEDULERS = "online/test_schedulers.py::"
REGRESSIONS, RESUME = "online/test_tuner_regressions.py::", "online/test_tuner_resume.py::"

ELSEWHERE: tuple[Listed, ...] = (
    Listed("every optimizer that has a rule", SUPPORTED, "", FD),
    Listed("gradient accumulation, with zeros kept too", SUPPORTED, "", FD),
    Listed("clip_grad_norm_", SUPPORTED, "`clip_norm=`", FD),
    Listed("GradScaler, with a fused optimizer too", SUPPORTED, "`scaler=`", FD),
    Listed(
        "steps that a GradScaler skips",
        SUPPORTED,
        "`scaler=`",
        "online/test_tuner.py::test_step_skipped_by_a_scaler_leaves_no_trace",
    ),
    Listed(
        "a scheduler",
        SUPPORTED,
        "its shape is lr's shape; a scale is tuned",
        SCHEDULERS + "test_hypergradient_is_that_of_scaling_all_that_is_written",
    ),
    Listed(
        "a scheduler and total_steps, or made in mid-run, or a schedule of the loop's own",
        SUPPORTED,
        "",
        SCHEDULERS + "test_the_shape_of_total_steps_by_a_scheduler_gives_the_same_run",
    ),
    Listed(
        "eta_min, min_lr and other learning rates that are not relative to the initial one",
        SAID,
        "give them relative to it",
        SCHEDULERS + "test_absolute_learning_rates_are_said_once_with_the_relative_form",
    ),
    Listed(
        "SWALR more than a hundred times off the initial lr",
        REFUSED,
        "`swa_lr=0.5 * lr`",
        SCHEDULERS + "test_swa_lr_far_from_the_initial_lr_is_refused_before_weights_change",
    ),
    Listed(
        "fused attention (scaled_dot_product_attention, nn.Transformer), torch.compile(model), model.compile()",
        SUPPORTED,
        "the plain form of the forward pass runs where a product is due; gradients are equal to rounding there",
        "online/test_forward_switch.py::test_hypergradients_are_those_of_the_stock_loop",
    ),
    Listed(
        "several modules called one by one, given as a ModuleList or ModuleDict, with fused attention",
        SUPPORTED,
        "",
        "online/test_forward_switch.py::test_modules_given_in_a_container_that_is_never_called",
    ),
    Listed(
        "a compiled optimizer.step",
        SUPPORTED,
        "lr in a tensor, as torch advises, saves one compilation",
        "online/test_forward_switch.py::test_a_compiled_step_is_not_compiled_again_and_gives_the_same",
    ),
    Listed(
        "the same in parts of the model that the loop calls, at most two modules below it",
        SUPPORTED,
        "",
        "online/test_forward_switch.py::test_parts_that_the_loop_calls_beside_the_model",
    ),
    Listed(
        "fused attention in the loop itself",
        REFUSED,
        "in a module, or `sdpa_kernel(SDPBackend.MATH)`",
        "online/test_forward_switch.py::test_attention_in_the_loop_itself_is_refused_with_the_way_out",
    ),
    Listed(
        "OneCycleLR with momentum tuned",
        REFUSED,
        "`cycle_momentum=False`",
        ARGUMENTS + "test_one_cycle_with_momentum_tuned_is_refused_at_once",
    ),
    Listed("tensors in the loss", SUPPORTED, "`hypers=`", "online/test_tuner.py::test_tensor_in_the_loss_is_tuned"),
    Listed("a batch that is NaN", SUPPORTED, "passed over", "online/test_tuner.py::test_bad_batch_does_nothing"),
    Listed(
        "loss.backward() at some steps",
        SAID,
        "`tuner.backward(loss)`",
        "online/test_tuner.py::test_plain_backward_is_counted_and_warned_of_once_and_trains_as_without",
    ),
    Listed(
        "clipping that was not declared",
        SAID,
        "`clip_norm=`",
        REGRESSIONS + "test_clipping_that_was_not_declared_so_is_counted_and_said",
    ),
    Listed(
        "optimizer.step(closure)",
        SUPPORTED,
        "",
        "online/test_closures.py::test_a_closure_gives_what_backward_and_step_give",
    ),
    Listed(
        "an optimizer that calls its closure more than once",
        REFUSED,
        "another optimizer",
        "online/test_closures.py::test_an_optimizer_that_needs_two_gradients_is_refused_and_weights_stay",
    ),
    Listed(
        "hooks on parameters", SUPPORTED, "differentiated", REGRESSIONS + "test_hook_on_a_parameter_is_differentiated"
    ),
    Listed(
        "full backward hooks on modules",
        REFUSED,
        "hooks on parameters",
        REGRESSIONS + "test_full_backward_hook_is_refused",
    ),
    Listed(
        "momentum written by hand in mid-run",
        SUPPORTED,
        "",
        REGRESSIONS + "test_momentum_written_from_0_during_the_run",
    ),
    Listed(
        "two tuners of one optimizer",
        REFUSED,
        "`close()` the first",
        REGRESSIONS + "test_second_tuner_of_an_optimizer_is_refused_until_the_first_is_closed",
    ),
    Listed(
        "parameters that some steps do not use",
        SUPPORTED,
        "",
        "online/test_tuner_modules.py::test_parameter_that_some_steps_do_not_use",
    ),
    Listed(
        "buffers that the model replaces",
        SAID,
        "right where they do not depend on the weights",
        "online/test_tuner_modules.py::test_buffer_that_is_replaced_in_a_live_loop",
    ),
    Listed(
        "BatchNorm validated in eval mode",
        SAID,
        'validate in train mode, or `tuner.step` with mode="unrolled"',
        "online/test_tuner.py::test_batchnorm_in_eval_mode_is_said_in_forward_mode_and_right_in_unrolled_mode",
    ),
    Listed(
        "several optimizers, together or in turn",
        SUPPORTED,
        "a list of them",
        SEVERAL + "test_several_optimizers_have_the_hypergradients_of_finite_differences",
    ),
    Listed(
        "several optimizers, each with a scheduler",
        SUPPORTED,
        "a list of them",
        SEVERAL + "test_several_optimizers_each_with_a_scheduler",
    ),
    Listed(
        "several optimizers, each clipped by itself",
        SAID,
        "clip over all",
        SEVERAL + "test_several_optimizers_clipped_each_by_itself_is_counted",
    ),
    Listed(
        "validation batches drawn by a loader",
        SUPPORTED,
        "",
        REGRESSIONS + "test_validation_batches_drawn_by_a_loader_differ_and_leave_trainings_stream_alone",
    ),
    Listed(
        "resumed from state_dicts, in any order",
        SUPPORTED,
        "",
        RESUME + "test_run_resumes_exactly_whatever_is_loaded_first",
    ),
    Listed(
        "steps beyond total_steps",
        SAID,
        "epochs * len(train_loader)",
        PHASES + "test_the_first_step_beyond_total_steps_is_said_once",
    ),
    *FURTHER,
    Listed("checkpoint(use_reentrant=True)", REFUSED, "`use_reentrant=False`", LAYERS),
    Listed("@once_differentiable functions", REFUSED, "differentiable operations in backward", LAYERS),
)
