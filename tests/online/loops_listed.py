"""Rows of docs/loops.md whose tests are of one subject each: processes, frozen layers, several losses, tensors in the loss, …"""

from __future__ import annotations

from dataclasses import dataclass

from tests.online.loop_rows import REFUSED, SAID, SUPPORTED


@dataclass(frozen=True)
class Listed:
    """A loop whose test is elsewhere.

    Args:
        loop, status, how: as in a `Row`.
        test: file::function, below tests/.
    """

    loop: str
    status: str
    how: str
    test: str


DDP, FROZEN = "online/test_distributed.py::", "online/test_frozen_layers.py::"
LOSSES, CHANGED = "online/test_several_losses.py::", "online/test_gradients_changed.py::"
TUNER_OWN = "online/test_tuner_own_tensors.py::"
RUNNING, RESUMED = "online/test_refused_while_running.py::", "online/test_resume_anywhere.py::"
ACCUMULATION, MISPLACED = "online/test_accumulation.py::", "online/test_misplaced_calls.py::"

FURTHER: tuple[Listed, ...] = (
    # ---- processes
    Listed("DistributedDataParallel: accumulation, clipping, scheduler, scaler, unequal shards", SUPPORTED,
           "docs/distributed.md", DDP + "test_ranks_train_as_one_process_on_all_rows"),
    Listed("the same with BatchNorm, dropout, bf16", SUPPORTED, "the mean of the ranks' own hypergradients",
           DDP + "test_ranks_are_equal_bit_for_bit"),
    Listed("a loss that is NaN on one rank", SUPPORTED, "every rank passes over the step",
           DDP + "test_every_rank_passes_over_the_step_that_is_nan_on_one"),
    Listed("tuner.step and hypergradient on several ranks", SUPPORTED, "", DDP + "test_whole_steps"),
    Listed("FSDP, SyncBatchNorm, static_graph, comm hooks, the inner module called in the training loss", REFUSED,
           "DistributedDataParallel as it is", DDP + "test_refused_before_weights_change"),
    # ---- what is trained changes
    Listed("a layer frozen in mid-run and unfrozen, gradual unfreezing, halves in turn", SUPPORTED, "`requires_grad_`",
           FROZEN + "test_what_is_trained_changes_in_mid_run"),
    Listed("a layer passed by in some steps (stochastic depth)", SUPPORTED, "", FROZEN + "test_layer_passed_by_in_some_steps"),
    Listed("a group frozen by lr = 0", SUPPORTED, "", FROZEN + "test_group_frozen_by_lr_0_and_unfrozen"),
    Listed("two nets, each frozen while the other learns", SUPPORTED, "",
           FROZEN + "test_two_nets_each_frozen_while_the_other_learns"),
    Listed("a val_loss of a net that is frozen when it is read (a GAN under toggle_optimizer)", SUPPORTED, "",
           FROZEN + "test_validation_loss_of_the_net_that_is_frozen_when_it_is_read"),
    Listed("a frozen parameter read outside of a call of the model", REFUSED, "compute the loss by model(...)",
           FROZEN + "test_frozen_layer_read_outside_of_a_call_is_refused_before_the_step"),
    Listed("add_param_group in mid-run", REFUSED, "hold the parameters from the start, frozen",
           FROZEN + "test_group_added_in_mid_run_is_refused_and_what_the_error_says_works"),
    # ---- several losses
    Listed("a GAN, one step each or five to one", SUPPORTED, "`total_steps`",
           LOSSES + "test_a_gan_ends_no_worse_than_twice_a_plain_run"),
    Listed("actor and critic, inputs=, several backward calls before the steps", SUPPORTED, "",
           LOSSES + "test_actor_and_critic_have_the_hypergradients_of_differences"),
    Listed("losses of very different sizes, each with an optimizer of its own", SUPPORTED, "",
           LOSSES + "test_a_loss_far_above_the_other_optimizers_is_no_spike"),
    # ---- gradients
    Listed("register_post_accumulate_grad_hook, hooks on AccumulateGrad nodes", SUPPORTED, "",
           ACCUMULATION + "test_hooks_see_what_they_see_under_loss_backward"),
    Listed("an optimizer that steps in the backward pass", SUPPORTED, "",
           ACCUMULATION + "test_an_optimizer_that_steps_in_the_backward_pass"),
    Listed("clip_grad_value_", SUPPORTED, "`clip_value=`", CHANGED + "test_clipping_by_value_is_differentiated"),
    Listed("clip_norm= or clip_value= of a loop that does not clip", SAID, "at the 20th step with gradients above it",
           "online/test_told_clipping.py::test_a_loop_that_was_said_to_clip_and_does_not_is_told_at_the_twentieth_step"),
    Listed("clipping by norm and by value", REFUSED, "one of them",
           CHANGED + "test_both_clippings_are_refused_before_anything_is_done"),
    Listed("gradients changed at every step in a way that is not known", REFUSED, "at the 20th; the error names the cause",
           CHANGED + "test_gradients_changed_at_twenty_steps_in_a_row_are_an_error_that_names_the_cause"),
    Listed("loss.backward() at every step", REFUSED, "at the 20th; `tuner.backward(loss)`",
           CHANGED + "test_a_backward_that_was_never_replaced_is_an_error_at_the_twentieth_step"),
    Listed("loss.backward() at every second step", SAID, "twice; `tuner.backward(loss)`",
           MISPLACED + "test_every_step_by_loss_backward_is_counted"),
    Listed("optimizer.step() called again without a backward", SAID, "differentiated as it is; `tuner.stats['repeated_steps']`",
           MISPLACED + "test_a_step_called_again_is_said_once_and_counted"),
    Listed("zero_grad between tuner.backward and optimizer.step", SAID, "at the 20th in a row; before backward or after the step",
           MISPLACED + "test_gradients_emptied_before_the_step_are_said_at_the_twentieth_in_a_row"),
    # ---- tensors in the loss
    Listed("tensors that the validation loss reads too (DARTS, learned augmentation)", SUPPORTED, "`hypers=`",
           TUNER_OWN + "test_backward"),
    Listed("a net that the loss calls (meta-weight-net)", SUPPORTED, "`hypers={'net': net}`",
           TUNER_OWN + "test_a_net_that_the_loss_calls"),
    Listed("hypers that no loss reads", REFUSED, "at the first step",
           TUNER_OWN + "test_what_nothing_reads_is_an_error_at_the_first_step"),
    Listed("more than 16 numbers in forward mode", REFUSED, '`tuner.step` with mode="unrolled"; or write mode="forward" out',
           TUNER_OWN + "test_many_numbers_in_forward_mode_unasked"),
    # ---- what is refused or said while running
    Listed("a schedule-free optimizer whose eval() and train() val_loss calls", REFUSED, "without them",
           RUNNING + "test_a_schedule_free_optimizer_in_val_loss"),
    Listed("an optimizer whose step needs a closure (LBFGS)", REFUSED, "another optimizer",
           RUNNING + "test_an_optimizer_that_needs_a_closure"),
    Listed("weights computed from loss.detach()", SAID, "where the graph shows it",
           RUNNING + "test_and_by_a_tuner_at_its_first_step"),
    Listed("a whole step under torch.compile", REFUSED, "compile the model",
           RUNNING + "test_a_whole_step_compiled_by_aot_autograd_is_refused_before_weights_change"),
    # ---- states
    Listed("killed and resumed anywhere, rolled back afterwards", SUPPORTED, "bit for bit",
           RESUMED + "test_run_killed_after_any_step_ends_bit_equal"),
    Listed("the tuner's state_dict loaded beside other weights", SAID, "at the next step; load model and optimizer too",
           "online/test_loaded_weights.py::test_a_state_beside_other_weights_is_said_once_at_the_first_step"),
    Listed("a state_dict of a run with another total_steps", SAID, "goes on at the new length",
           "online/test_loaded_weights.py::test_a_state_of_a_run_of_another_length_is_said"),
    Listed("a copy or pickle of a tuner", REFUSED, "a new Tuner with its state_dict",
           "online/test_tuner_resume.py::test_tuner_is_not_copied_and_what_the_error_says_to_do_goes_on"),
    Listed("Adam on one number, a start that leads nowhere", SUPPORTED, "the start is undone",
           "online/test_start_watch.py::test_adam_on_one_number_does_not_end_with_a_dead_unit"),
)  # fmt: skip
